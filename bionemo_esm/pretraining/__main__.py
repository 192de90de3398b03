"""`python -m bionemo_esm.pretraining recipe=laptop`: pretraining where there is no checkout, and so no `examples/`."""

from __future__ import annotations

import hydra

from bionemo_esm import config_directory
from bionemo_esm.command_line import check_command_line
from bionemo_esm.pretraining.run import pretrain


def main() -> None:
    """Compose the configuration from the command line and run it."""
    check_command_line("pretrain_esm1nv")
    hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="pretrain_esm1nv")(pretrain)()


if __name__ == "__main__":
    main()
