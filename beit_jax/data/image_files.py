"""Files and folders of images that a command is given."""

import pathlib
from collections.abc import Sequence

from beit_jax.data import folder, images, notices
from beit_jax.data.files import FileSource
from beit_jax.data.source import Source


def find(paths: Sequence[str]) -> list[pathlib.Path]:
    """The files among `paths`, all images below the folders among them, and those that CSV files
    among them list; the log names what else lies in folders.

    Raises:
      FileNotFoundError: a path is not there, or a folder has no images.
      ValueError: a CSV file cannot be read, or lists nothing.
    """
    found = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            listing = folder.list_folder(path, labelled=False)
            files = (id for split in listing.splits.values() for id in split.ids)
            found += sorted(listing.root / id for id in files)
            notices.ignored_files(path, listing.ignored)
        elif path.suffix.lower() == ".csv":
            listing = folder.list_csv(path, labelled=False)
            found += [listing.root / id for split in listing.splits.values() for id in split.ids]
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"There is no image or folder {path}.")
    return found


def as_source(paths: Sequence[pathlib.Path]) -> Source:
    """The files as a source without labels, which notes those that cannot be read."""
    return FileSource(
        "files", "images", None, "record", root=pathlib.Path(), ids=paths, labels=None
    )


def unread(source: Source) -> list[images.BadImageError]:
    """An error for each image of a source that could not be read."""
    ids = map(source.id, range(len(source)))
    return [images.BadImageError(x, source.bad_images[x]) for x in ids if x in source.bad_images]


def read(
    paths: Sequence[pathlib.Path], crop
) -> tuple[list[images.Rendered], list[images.BadImageError]]:
    """What `crop` makes of each file, and an error for each that cannot be read.

    Raises:
      ValueError: none can be read.
    """
    found, bad = [], []
    for path in paths:
        try:
            found.append(_read(path, crop))
        except images.BadImageError as error:
            bad.append(error)
    if not found:
        raise ValueError("; ".join(map(str, bad)))
    return found, bad


def _read(path, crop):
    with images.naming(lambda: str(path)):
        return crop(images.open_image(path))
