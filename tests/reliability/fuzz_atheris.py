"""One target under atheris: `python -m reliability.fuzz_atheris TARGET [libFuzzer's options]`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path


def main() -> None:
    """Fuzz until the options say enough."""
    import atheris  # noqa: PLC0415 - an extra

    with atheris.instrument_imports(include=["symbiosis"], exclude=["symbiosis.protocols._generated"]):
        from reliability.targets import all_targets, execute, scratch_folder  # noqa: PLC0415

    logging.disable(logging.CRITICAL)
    name, *options = sys.argv[1:]
    with scratch_folder() as folder:
        work = Path(folder)
        (target,) = [one for one in all_targets(work) if one.name == name]
        corpus = work / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(target.seeds):
            (corpus / str(number)).write_bytes(seed)
        atheris.Setup(
            [sys.argv[0], *options, f"-artifact_prefix={work}/", str(corpus)], lambda data: _one(execute, target, data)
        )
        atheris.Fuzz()


def _one(execute: object, target: object, data: bytes) -> None:
    execute(target, data)  # type: ignore[operator]


if __name__ == "__main__":
    main()
