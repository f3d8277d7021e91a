"""Lists the images in a folder or a CSV file, without decoding them.

    PATH/CLASS/**/x.jpg             class folders; folders below them do not matter
    PATH/{train,val,test}/CLASS/**  the same with split folders
    PATH/x.jpg, PATH/test/x.jpg     no class folders: no labels
    PATH/list.csv                   columns `image` (or `file_name`, `path`), `label`, `split`

Class numbers follow the sorted class names of all splits together, so that a class that is
missing from one split does not shift the others. An ambiguous layout is an error: images
beside class folders, class folders beside split folders, an empty class folder.
"""

import collections
import csv
import os
import pathlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from beit_jax.data.images import EXTENSIONS

SPLIT_FOLDERS = ("train", "val", "valid", "validation", "test")
_IMAGE_COLUMNS = ("image", "file_name", "path")


class Files(NamedTuple):
    """The images of one split."""

    ids: Sequence[str]  # POSIX paths, relative to the listing's root
    labels: np.ndarray | None  # int32 [N]
    groups: np.ndarray  # int [N], to be mixed evenly: the labels, even where `labels` is None


class EmptyFoldersError(ValueError):
    """Class folders without an image."""


class UnknownClassesError(ValueError):
    """Classes that are not those expected, perhaps the `same_number` of them."""

    def __init__(self, message: str, *, same_number: bool):
        super().__init__(message)
        self.same_number = same_number


class Listing(NamedTuple):
    """The images of all splits."""

    root: pathlib.Path
    splits: Mapping[str, Files]
    class_names: tuple[str, ...] | None
    ignored: Sequence[tuple[str, int]] = ()  # (".txt", 2): files that are not images
    mixed: Sequence[str] = ()  # folders with the name of a split that are not splits


def list_folder(
    root: str | os.PathLike,
    *,
    labelled: bool = True,
    class_names: Sequence[str] | int | None = None,
) -> Listing:
    """Lists the images in a folder; hidden files and folders are left out.

    Args:
      root: the folder.
      labelled: False takes every image at any depth and no labels, for pre-training.
      class_names: the classes in the order of their numbers; default: the sorted folder names.

    Raises:
      FileNotFoundError: no such folder, or no images in it.
      EmptyFoldersError: class folders are empty; names all of them.
      UnknownClassesError: a class folder is not in `class_names`.
      ValueError: it is a file, or the layout is ambiguous.
    """
    root = pathlib.Path(root).expanduser()
    if root.is_file():
        raise ValueError(f"{root} is a file; expected a folder of images, or a CSV list of them")
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    files = sorted(_find_files(root))
    ids = [file for file in files if file.lower().endswith(EXTENSIONS)]
    if not ids:
        raise FileNotFoundError(f"no images in {root}; looked for {' '.join(EXTENSIONS)}")
    if labelled:
        _check_split_names(root, ids)
    prefixes = _split_prefixes(root, ids, labelled)
    ids = {name: [i for i in ids if i.startswith(prefix)] for name, prefix in prefixes.items()}
    labels = {
        name: _class_folders(root / prefixes[name], [i.removeprefix(prefixes[name]) for i in group])
        if labelled
        else None
        for name, group in ids.items()
    }
    _check_empty(root, prefixes, labels)
    others = (file for file in files if not file.lower().endswith(EXTENSIONS))
    endings = collections.Counter(os.path.splitext(file)[1].lower() or "other" for file in others)
    tops = {name: [_top(i.removeprefix(prefixes[name])) for i in ids[name]] for name in ids}
    listing = _listing(root, ids, labels, tops, class_names, root)
    has_splits = "" not in prefixes.values()
    mixed = () if has_splits else sorted({*SPLIT_FOLDERS} & {*tops["train"]})
    return listing._replace(ignored=endings.most_common(), mixed=mixed)


def list_csv(
    path: str | os.PathLike,
    *,
    labelled: bool = True,
    class_names: Sequence[str] | int | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> Listing:
    """Lists the images named in a CSV file with a header.

    Relative image paths start at the file's folder. Labels are class names; where all are whole
    numbers they are sorted as such, or are positions in `class_names` where these are text.
    Without a column `split` all rows are "train".

    Args:
      path: the CSV file.
      labelled: False takes no labels.
      class_names: the classes in the order of their numbers; default: the sorted labels. An int is
        the number of classes without names, to which labels that are whole numbers belong.
      image_key, label_key: names of the columns, if others.

    Raises:
      FileNotFoundError: no such file.
      UnknownClassesError: a label is not in `class_names`.
      ValueError: it is not a CSV file in UTF-8, or a column or a cell is missing.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        ids, labels, groups = _read_csv(path, labelled, image_key, label_key)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path}: {error}; save it as a CSV file in UTF-8, with every quote closed"
        ) from None
    return _listing(path.parent, ids, labels, groups, class_names, path)


def _read_csv(path, labelled, image_key, label_key) -> tuple[dict, dict, dict]:
    """The images of each split, their labels or None, and the groups to be mixed evenly."""
    image_columns = _IMAGE_COLUMNS if image_key is None else (image_key,)
    label_column = label_key or "label"
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True, strict=True)
        columns = reader.fieldnames or ()
        image_column = next((c for c in image_columns if c in columns), None)
        for wanted, is_there in (
            (f"one of the columns {', '.join(image_columns)}", image_column is not None),
            (f"the column {label_key}", label_key is None or label_key in columns),
        ):
            if not is_there:
                found = ", ".join(columns) or "nothing"
                raise ValueError(
                    f"{path}: the header must name {wanted}, spelt so and separated by commas; "
                    f"got {found}"
                )
        has_labels = label_column in columns
        labelled = labelled and has_labels
        needed = [image_column, *[label_column] * labelled, *["split"] * ("split" in columns)]
        ids, labels, groups = {}, {}, {}
        for row in reader:
            row |= {column: (row[column] or "").strip() for column in needed[1:]}
            if not all(row[column] for column in needed):
                raise ValueError(f"{path}, line {reader.line_num}: {', '.join(needed)} needed")
            if "\0" in row[image_column]:
                raise ValueError(f"{path}, line {reader.line_num}: a path with a zero byte")
            split = row.get("split", "train")
            ids.setdefault(split, []).append(row[image_column])
            labels.setdefault(split, []).append(row[label_column] if labelled else None)
            group = row[label_column] if has_labels else _top(row[image_column])
            groups.setdefault(split, []).append(group or "")
    if not ids:
        raise ValueError(f"{path} has a header and no rows")
    return ids, labels if labelled else dict.fromkeys(ids), groups


def _top(id: str) -> str:
    """The first folder of an id; "" where there is none."""
    return id.rpartition("/")[0].partition("/")[0]


def _find_files(root: pathlib.Path) -> Iterator[str]:
    """All files that are not hidden, as POSIX paths relative to the root."""

    def fail(error):
        raise error

    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        relative = pathlib.Path(folder).relative_to(root)
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not _leads_back(root, relative / name)
        ]
        for name in files:
            if not name.startswith("."):
                yield (relative / name).as_posix()


def _leads_back(root: pathlib.Path, folder: pathlib.Path) -> bool:
    """Whether it is a link to a folder on the path to it or above, which would never end."""
    if not (root / folder).is_symlink():
        return False
    target = os.path.realpath(root / folder)
    way = (os.path.realpath(root / above) for above in folder.parents)
    return any(os.path.commonpath([target, above]) == target for above in way)


def _split_prefixes(root: pathlib.Path, ids: Sequence[str], labelled: bool) -> dict[str, str]:
    """{"train": "train/", "test": "test/"}, or {"train": ""} where there are no split folders."""
    tops = {id.partition("/")[0] if "/" in id else "" for id in ids}
    if tops <= set(SPLIT_FOLDERS):
        return {name: f"{name}/" for name in SPLIT_FOLDERS if name in tops}
    for name in SPLIT_FOLDERS:
        if labelled and any(id.startswith(f"{name}/") and id.count("/") > 1 for id in ids):
            others = ", ".join(sorted(tops - set(SPLIT_FOLDERS) - {""})) or "images"
            raise ValueError(
                f"{root} holds the split folder {name!r} beside {others}: name one folder, such as "
                f"{root / name}, or move the others away"
            )
    return {"train": ""}


def _check_split_names(root: pathlib.Path, ids: Sequence[str]) -> None:
    """Raises ValueError where all folders look like splits, and some are misspelt."""
    tops = sorted({id.partition("/")[0] for id in ids})
    if (
        len(tops) > 1
        and any(map(is_nearly_a_split, tops))
        and all(name in SPLIT_FOLDERS or is_nearly_a_split(name) for name in tops)
        and any(id.count("/") > 1 for id in ids)
    ):
        raise ValueError(
            f"the folders {', '.join(tops)} of {root} look like splits; name them "
            f"{', '.join(SPLIT_FOLDERS)}, in lower case"
        )


def is_nearly_a_split(name: str) -> bool:
    """Whether it is a variant of the name of a split, such as Test or training."""
    alike = "training", "testing", *SPLIT_FOLDERS
    return name not in SPLIT_FOLDERS and name.lower() in alike


def _class_folders(folder: pathlib.Path, ids: Sequence[str]) -> list[str] | None:
    """The first folder of each id; None where all images lie in `folder` itself."""
    flat = [id for id in ids if "/" not in id]
    if len(flat) == len(ids):
        return None
    if flat:
        raise ValueError(
            f"{folder} has class folders and {len(flat)} images beside them ({flat[0]}, ...): "
            "move these into class folders, or set labelled=False (of beit_jax.data: --unlabelled) "
            "to use all without labels"
        )
    return [id.partition("/")[0] for id in ids]


def _check_empty(root, prefixes, labels) -> None:
    """Raises EmptyFoldersError where a class folder has no images."""
    empty = []
    for name, classes in labels.items():
        if classes is not None:
            folders = (root / prefixes[name]).iterdir()
            visible = {f.name for f in folders if f.is_dir() and not f.name.startswith(".")}
            empty += [prefixes[name] + folder for folder in sorted(visible - set(classes))]
    if empty:
        raise EmptyFoldersError(
            f"no images in the class folders {', '.join(empty)} of {root}; looked for "
            f"{' '.join(EXTENSIONS)}: remove these folders, or put images there"
        )


def _listing(root, ids, labels, groups, class_names, where) -> Listing:
    """Numbers classes and groups; `labels` are text, or None for a split without."""
    labels = {name: own and list(map(_class_name, own)) for name, own in labels.items()}
    found = {label for split in labels.values() if split for label in split}
    class_names, number = _number_classes(found, class_names, where) if found else (None, {})
    splits = {}
    for name, own in labels.items():
        numbered = None if own is None else np.array([number[label] for label in own], np.int32)
        mixed = np.unique(list(map(_class_name, groups[name])), return_inverse=True)[1]
        splits[name] = Files(ids[name], numbered, mixed)
    return Listing(root, splits, class_names)


def _class_name(text: str) -> str:
    """The text in one Unicode form: macOS separates accents from letters."""
    return unicodedata.normalize("NFC", text).strip()


def _number_classes(found, class_names, where) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns all class names, and the number of each label found."""
    digits = where.suffix.lower() == ".csv" and all(label.isdecimal() for label in found)
    if digits and len(set(map(int, found))) < len(found):
        raise ValueError(f"{where} has labels that are the same number, such as 1 and 01")
    if isinstance(class_names, int):
        class_names = [str(i) for i in range(class_names)] if digits else None
    if class_names is None:
        class_names = sorted(found, key=int if digits else None)
    number = {_class_name(name): i for i, name in enumerate(class_names)}
    has_numbers = any(name.isdecimal() for name in class_names)  # which labels would be names
    if digits and not has_numbers:
        number = {label: int(label) for label in found if int(label) < len(class_names)}
    if unknown := sorted(found - number.keys()):
        raise UnknownClassesError(
            f"{where} has the classes {', '.join(unknown)} that are not among the "
            f"{len(class_names)} expected: {', '.join(class_names)}",
            same_number=len(found) == len(class_names),
        )
    return tuple(class_names), number
