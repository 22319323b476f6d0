"""``python -m remap_cli``, which launchers such as torchrun start."""

from remap_cli.main import main

main()
