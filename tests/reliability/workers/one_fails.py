"""The command line, with something that goes wrong in the second process only."""

import os

from remap_cli.main import main

if os.environ.get("RANK") == "1":
    from remap.distributed.launch import accelerator
    from remap.errors import DataError
    from remap.pipeline import run

    def fail(*arguments: object, **words: object) -> None:
        accelerator()
        raise DataError("the disk of this machine is gone", given="/data")

    run.build_components = fail
main()
