"""Converts checkpoints from and to HuggingFace and PEFT.

python -m beit_jax.convert from-hf microsoft/beit-base-patch16-224 workdir
python -m beit_jax.convert to-hf workdir huggingface_directory --verify
python -m beit_jax.convert to-peft workdir adapter_directory
python -m beit_jax.convert from-peft adapter_directory workdir
"""

import argparse
import functools
import os
import sys
from collections.abc import Sequence

import numpy as np

from beit_jax import checkpoint, command, convert, errors, lora, pretrained
from beit_jax.architecture import make_model
from beit_jax.convert import beit, files, peft, preprocessor, verify

_TASKS = {"classifier": "classify", "mim": "pretrain", "none": "classify"}
_TOLERANCE = 1e-4
_OF_THE_BASE = (  # fields that decide the result and that no parameter's shape shows
    "image_size",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "use_mean_pooling",
    "use_absolute_position_embeddings",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 where `--verify` found a difference, 2 for bad input."""
    parser = _parser()
    args = parser.parse_args(argv)
    return command.guard(parser, functools.partial(args.command, args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m beit_jax.convert", description=convert.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    from_hf = commands.add_parser("from-hf", help="a model of HuggingFace, unilm or timm to ours")
    from_hf.add_argument("src", metavar="SRC", help="directory, file, or repository on the Hub")
    from_hf.add_argument("dst", metavar="DST", help="workdir to write; must be new")
    from_hf.add_argument("--revision", help="branch, tag or commit of the repository")
    from_hf.set_defaults(command=_from_hf)

    to_hf = commands.add_parser("to-hf", help="a model of ours to a HuggingFace directory")
    to_hf.add_argument("workdir", metavar="WORKDIR", help="workdir of a run, or of from-hf")
    to_hf.add_argument("dst", metavar="DST", help="directory to write: new, or an earlier export")
    to_hf.add_argument("--step", type=_step, default="best", help="best, latest or a number")
    to_hf.add_argument(
        "--model-type", help="of config.json, where there is a choice: data2vec-vision"
    )
    to_hf.add_argument("--verify", action="store_true", help="compare the logits with torch's")
    to_hf.set_defaults(command=_to_hf)

    to_peft = commands.add_parser("to-peft", help="LoRA adapters of ours to a PEFT directory")
    to_peft.add_argument("workdir", metavar="WORKDIR", help="workdir of a run with config.lora")
    to_peft.add_argument("dst", metavar="DST", help="directory to write; must be new")
    to_peft.add_argument("--step", type=_step, default="best", help="best, latest or a number")
    to_peft.add_argument(
        "--transformers", type=int, choices=[4, 5], default=5, help="major version that reads it"
    )
    to_peft.set_defaults(command=_to_peft)

    from_peft = commands.add_parser("from-peft", help="LoRA adapters of PEFT to a workdir")
    from_peft.add_argument("src", metavar="SRC", help="PEFT directory")
    from_peft.add_argument("dst", metavar="DST", help="workdir to write; must be new")
    from_peft.add_argument("--base", help="the model they adapt, if not as their config names it")
    from_peft.set_defaults(command=_from_peft)
    return parser


def _step(text: str) -> str | int:
    if text in ("best", "latest"):
        return text
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"must be best, latest or a number; got {text!r}")


def _workdir_and_step(args) -> tuple[str, str | int]:
    """WORKDIR and --step, or WORKDIR@STEP."""
    workdir, step = pretrained.workdir_and_step(args.workdir)
    return workdir or args.workdir, step if args.step == "best" else args.step


def _from_hf(args) -> int:
    with files.new_directory(args.dst) as workdir:
        loaded = convert.load(args.src, revision=args.revision)
        if loaded.image is None:
            default = preprocessor.DEFAULT
            print(f"note: {args.src} does not specify its preprocessing; assuming {default}")
        if loaded.unfilled:
            print(f"note: {args.src} has no {', '.join(loaded.unfilled)}")
        head = loaded.architecture["head"]
        info = checkpoint.ModelInfo(
            model_name=loaded.model_name,
            task=_TASKS[head],
            architecture=loaded.architecture,
            class_names=loaded.class_names,
            image=loaded.image or preprocessor.DEFAULT,
            pretrained=loaded.source,
        )
        checkpoint.write_model_info(workdir, info)
        with checkpoint.Checkpointer(workdir) as saver:
            saver.save(0, {"params": loaded.params})
    size = loaded.architecture["image_size"]
    print(f"{args.dst}: {loaded.model_name}, {head} model, image_size {size}")
    return 0


def _to_hf(args) -> int:
    if args.verify:
        verify.check_installed()
    params, info = pretrained.load_workdir(*_workdir_and_step(args))
    architecture = info.architecture
    if info.task == "pretrain" and architecture["head"] == "tokens":
        params, architecture = beit.backbone(params, architecture)
        print("note: the network alone is written, without what predicted pixels or features")
    place = ", in the place of an earlier export" if os.path.exists(args.dst) else ""
    convert.save_hf(
        args.dst,
        params,
        architecture,
        info.class_names,
        info.image,
        model_name=info.model_name,
        model_type=args.model_type,
    )
    print(f"{args.dst}: written{place}")
    if not args.verify:
        return 0
    difference, largest = verify.max_difference(args.dst, params, architecture)
    is_same = difference <= _TOLERANCE
    verdict = "ok" if is_same else "too large"
    share = difference / largest if largest else difference
    print(
        f"largest difference from transformers: {difference:.3g}, {share:.2g} of the largest "
        f"output ({verdict})"
    )
    return 0 if is_same else 1


def _to_peft(args) -> int:
    workdir, step = _workdir_and_step(args)
    info = checkpoint.read_model_info(workdir)
    if info.model_name != "beit" or not info.lora:
        raise ValueError(
            f"{args.workdir} has no LoRA adapters of a beit; to-hf writes the whole model"
        )
    _check_as_the_base(info)
    params = lora.flat(checkpoint.load_params(workdir, step=step))
    with files.new_directory(args.dst) as directory:
        peft.save(directory, params, info.lora, args.transformers, info.class_names)
    base = info.lora["base"]
    print(f"{args.dst}: adapters of {base} written")
    if pretrained.workdir_and_step(base)[0]:
        print(
            f"note: {base} is a workdir, which PEFT does not read: `convert to-hf` writes it for "
            "transformers, and base_model_name_or_path in adapter_config.json is to name that"
        )
    return 0


def _check_as_the_base(info) -> None:
    """Raises ValueError where the network of the adapters differs from their base in more than
    shapes: PEFT would use them with the base as it is."""
    base = pretrained.load(info.lora["base"], info.lora.get("revision", "")).info
    ours, theirs = (make_model(x).config for x in (info, base))
    for key in _OF_THE_BASE:
        if getattr(ours, key) != getattr(theirs, key):
            raise ValueError(
                f"The adapters were trained with {key} {getattr(ours, key)}, and their base "
                f"{info.lora['base']} has {getattr(theirs, key)}, with which PEFT would use them: "
                "`convert to-hf` writes the whole model instead."
            )


def _new_pooler(params) -> dict[str, np.ndarray]:
    """The initial norm of a pooler that the base lacks, which PEFT does not train."""
    return {
        name: np.full(np.shape(params[name]), x)
        for name, x in beit.NEW_POOLER.items()
        if name in params and np.isnan(params[name]).any()
    }


def _from_peft(args) -> int:
    adapters = peft.read(args.src)
    source = args.base or adapters.base
    if not source:
        raise ValueError(f"{args.src} does not name the model that it adapts; give --base")
    base = pretrained.load(source)
    info = base.info._replace(task="classify", pretrained=str(args.src))
    if "classifier/kernel" in adapters.params:
        count = adapters.params["classifier/kernel"].shape[1]
        architecture = dict(info.architecture, head="classifier", num_labels=count)
        names = adapters.class_names or info.class_names
        names = names if len(names or ()) == count else None
        info = info._replace(architecture=architecture, class_names=names)
    params = lora.flat(pretrained.blank_filled(base, info, "unilm"))
    lora.check_shapes(adapters.params, params, source)
    trained = {**_new_pooler(params), **adapters.params}
    missing = [name for name, x in params.items() if np.isnan(x).any() and name not in trained]
    if missing:
        raise ValueError(
            f"Neither {source} nor the adapters have {errors.few(missing)}: with --base name the "
            "model that they were trained on."
        )
    if args.base and adapters.base and args.base != adapters.base:
        print(f"note: {args.src} names {adapters.base} as its base; taking {args.base}")
    frozen = {name: x for name, x in params.items() if name not in trained}
    identity = {
        "base": lora.absolute(source),
        "base_crc32": lora.fingerprint(frozen),
        "resize_method": "unilm",
    }
    info = info._replace(lora=adapters.settings | identity)
    with files.new_directory(args.dst) as workdir:
        checkpoint.write_model_info(workdir, info)
        with checkpoint.Checkpointer(workdir) as saver:
            saver.save(0, {"params": lora.nested(trained)})
    print(f"{args.dst}: adapters of rank {adapters.settings['rank']} for {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
