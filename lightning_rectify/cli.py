"""The command line: ``lightning-rectify fit|validate|test|predict --config FILE``."""

import os
import sys
from typing import Any

from lightning_rectify._lightning import ArgsType, LightningArgumentParser, LightningCLI
from lightning_rectify.callbacks.adaptive_rate import AdaptiveRateMonitor


class RectifyCLI(LightningCLI):
    """LightningCLI for any module and data class, the package's or a user's, named by import path.

    Beside Lightning's own, a configuration has two keys: ``adaptive_rate``, the arguments of
    :class:`AdaptiveRateMonitor` (which is always there; where it cannot work it says so and stays silent, unless
    ``strict``), and ``test_after_fit``. Optimizers and schedules are arguments of the module (``model.optimizer``), one
    a player, not of the command line.

    Args:
        args: arguments in place of the command line's: a list of strings, or a nested dict.
        run: whether to run the subcommand; False only parses and instantiates.
        **kwargs: for LightningCLI.
    """

    def __init__(self, args: ArgsType = None, run: bool = True, **kwargs: Any) -> None:
        # An optimizer of the command line's would replace the configure_optimizers of a game.
        kwargs = {"auto_configure_optimizers": False, "seed_everything_default": 1} | kwargs
        super().__init__(args=args, run=run, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the monitor's block and ``test_after_fit``."""
        parser.add_lightning_class_args(AdaptiveRateMonitor, "adaptive_rate")
        parser.set_defaults({"adaptive_rate.strict": False})
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="After fit, test the best checkpoint (without checkpoints: the last weights).",
        )

    def after_fit(self) -> None:
        """Test what was fitted, if asked to."""
        if not self._get(self.config_init, "test_after_fit"):
            return
        saved = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best" if saved else None)


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: arguments in place of ``sys.argv``.
    """
    # As with ``python -m``: modules of the folder one stands in can be named.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    RectifyCLI(args=args)


if __name__ == "__main__":
    main()
