"""``fit``: the LightningCLI with this project's defaults, run folders and error messages."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt_scratch.callbacks.checkpointing import Checkpointing, RunDirCallback
from lit_gpt_scratch.callbacks.default_callbacks import default_callbacks
from lit_gpt_scratch.callbacks.introspection import ActivationStats
from lit_gpt_scratch.callbacks.run_plan import RunPlan
from lit_gpt_scratch.callbacks.signal_handling import SignalHandling, exit_on_signal
from lit_gpt_scratch.callbacks.summary import BaselineMetrics, RunMetadata
from lit_gpt_scratch.checkpoint.checkpoint_io import AtomicCheckpointIO, BackgroundCheckpointIO
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.cli.error_formatting import silence_libraries, user_errors
from lit_gpt_scratch.cli.preset import apply_init_from, apply_preset, find_preset
from lit_gpt_scratch.cli.resume import ResumedRun
from lit_gpt_scratch.cli.run_flags import add_run_flags
from lit_gpt_scratch.cli.saved_config import SaveConfig, config_to_dict
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.distributed.hardware_defaults import configure_process, default_precision
from lit_gpt_scratch.distributed.parallelize import validate_tensor_parallel
from lit_gpt_scratch.distributed.strategies import resolve_strategy, resolve_tensor_parallel_size
from lit_gpt_scratch.distributed.validate_hardware import explain_out_of_memory, validate_hardware
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.lightning_compat import kill_child_processes
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.tasks.gpt_module import GPTModule

MAX_STEPS = 900
"""Length of a run for which no steps, epochs or time were asked."""
CLEANING = [{"class_path": "lit_gpt_scratch.text.duplicates.ExactDuplicates"}]
"""The data's own default, in the form of a config: an instance could not be written into one."""


class FitCLI(LightningCLI):
    """Parse flags and configs, build the trainer, the task and the data, and claim a run folder.

    Raises:
        UserError: Whatever is wrong with flags, configs or files; nothing is left behind then.
    """

    description = (
        f"Train a GPT on real text, {MAX_STEPS} steps unless you set steps, epochs or time. "
        "All flags of the model and the data: --model.help LanguageModel, --data.help PackedText."
    )

    def __init__(self, args: ArgsType = None) -> None:
        with user_errors():
            super().__init__(
                model_class=LightningModule,
                datamodule_class=LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_callback=None,  # it follows the logger; the config belongs into the run's folder
                trainer_defaults={
                    "gradient_clip_val": 1.0,
                    "log_every_n_steps": 10,
                    "val_check_interval": 300,
                    "check_val_every_n_epoch": None,
                    "num_sanity_val_steps": 0,
                    "enable_model_summary": False,
                    "use_distributed_sampler": False,  # the order of windows is the data's own
                },
                parser_kwargs={"allow_abbrev": False, "exit_on_error": False, "description": self.description},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=args,
                run=False,
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is not the trainer's, the model's or the data's."""
        add_run_flags(parser)
        parser.add_lightning_class_args(Checkpointing, "checkpoint")
        parser.add_lightning_class_args(ActivationStats, "inspect")
        parser.set_defaults(
            {
                "model": {
                    "class_path": "lit_gpt_scratch.tasks.LanguageModel",
                    "init_args": {"gpt": asdict(GPTConfig())},
                },
                "data": {"class_path": "lit_gpt_scratch.data.PackedText", "init_args": {"cleaning": CLEANING}},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Read the flags; a resumed run's own flags come first, so that only changes need to be given."""
        flags = list(sys.argv[1:] if args is None else args)
        apply_preset(parser, find_preset(flags))
        self.config = parser.parse_args(flags)
        if self.config.ckpt_path is None and apply_init_from(parser, self.config):
            self.config = parser.parse_args(flags)
        self.resumed: ResumedRun | None = None
        self.config_before: Namespace | None = None
        if self.config.ckpt_path is not None:
            self.resumed = ResumedRun.find(self.config.ckpt_path, Path(self.config.runs), self.config.experiment)
            if self.resumed and self.resumed.folder and self.resumed.folder.config.is_file():
                before = ["--config", str(self.resumed.folder.config)]
                self.config_before = parser.parse_args(before)
                self.config = parser.parse_args([*before, *flags])
        trainer = self.config.trainer
        if trainer.max_steps == -1 and trainer.max_epochs is None and trainer.max_time is None:
            trainer.max_steps = MAX_STEPS
        if trainer.precision is None:
            trainer.precision = default_precision(str(trainer.accelerator)).value
        for name in ("accumulate_grad_batches", "val_check_interval"):
            if isinstance(trainer[name], int | float) and trainer[name] <= 0:
                raise UserError(f"--trainer.{name} is {trainer[name]}; it must be positive")
        if self.config.seed_everything < 0:
            raise UserError(f"--seed_everything is {self.config.seed_everything}; it must be 0 or more")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; its own complaints about flags are the user's to read."""
        config = {**self.config_init.trainer, **kwargs}
        validate_hardware(config)
        config["strategy"] = resolve_strategy(config["strategy"], self.config_init.tensor_parallel)
        if isinstance(config["callbacks"], Callback):
            config["callbacks"] = [config["callbacks"]]
        if self.config_init.plan:
            config |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            plan = RunPlan(only=True, validates=config["limit_val_batches"] != 0)
            config |= {"limit_val_batches": 0, "callbacks": [*(config["callbacks"] or []), BaselineMetrics(), plan]}
        else:
            config["callbacks"] = [*(config["callbacks"] or []), *self._callbacks(config)]
        try:
            trainer = Trainer(**config)
        # An unknown strategy, a library that an accelerator needs, a cluster whose variables contradict the flags.
        except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
            asked = [f"--trainer.{name} {config[name]}" for name in ("accelerator", "devices", "strategy", "precision")]
            raise UserError(f"{' '.join(asked)}: {error}") from error
        if isinstance(self.model, GPTModule):  # here, where one process says it and not each
            adapters = self.model.lora is not None
            size = resolve_tensor_parallel_size(trainer.strategy)
            validate_tensor_parallel(self.model.gpt, size, str(trainer.precision), adapters)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a user's own plugin stays
            background = self.config_init.checkpoint.background
            trainer.strategy.checkpoint_io = BackgroundCheckpointIO() if background else AtomicCheckpointIO()
        return trainer

    def _callbacks(self, config: Mapping[str, Any]) -> list[Callback]:
        saves, shows_progress = (config[f"enable_{name}"] is not False for name in ("checkpointing", "progress_bar"))
        saving = self.config_init.checkpoint if saves else None
        self.stopping, self.provenance = SignalHandling(saving), RunMetadata()
        written = [SaveConfig(self.parser, self.config), self.provenance]
        return default_callbacks(
            written, self.config_init.inspect, self.stopping, saving, shows_progress, self.config_init.guard
        )

    def fit(self) -> None:
        """Prepare the data, claim the run folder, train.

        Raises:
            UserError: Data, folder or checkpoint are unusable, another process trains in the folder, or there is
                nothing to do; a folder that was claimed for this run is removed.
            SystemExit: A signal came.
        """
        leaves_nothing = self.config.plan or self.config.trainer.fast_dev_run
        folder = self.resumed.folder if self.resumed and not leaves_nothing else None
        claimed = None
        try:
            with user_errors(), explain_out_of_memory(self.datamodule), ExitStack() as ownership:
                if folder and self.trainer.is_global_zero:  # before its checkpoint is read: its owner may write a newer
                    ownership.enter_context(folder.lock())
                first_step = self.resumed.steps_done(self.trainer, self.config.force) if self.resumed else 0
                self._settle_start()
                # Before there is a folder, so that unusable data leaves none behind.
                self.datamodule.prepare_data()
                self.datamodule.setup("fit")
                if self.resumed:
                    self._compare(self.resumed)
                if folder is None and self.trainer.is_global_zero and not leaves_nothing:
                    folder = claimed = RunFolder.create(Path(self.config.runs), self.config.experiment)
                    ownership.enter_context(folder.lock())
                self._settle_in(folder, first_step)
                checkpoint = self.resumed.checkpoint if self.resumed else None
                self.trainer.fit(self.model, self.datamodule, ckpt_path=checkpoint)
                if self.trainer.global_step == 0:
                    raise UserError(
                        "there was no step to do; ask for more: --trainer.max_steps or --trainer.max_epochs"
                    )
                if getattr(self.datamodule, "test_dataset", None) and not leaves_nothing and not self.stopping.signum:
                    self.trainer.test(self.model, self.datamodule, verbose=False)
        except BaseException:  # whatever it is, a signal too: other ranks may wait for this one, which is leaving
            kill_child_processes(self.trainer)
            raise
        finally:
            if claimed and not self.trainer.global_step:
                claimed.delete()
        if not self.config.plan and self.stopping.signum:  # it came when all was done
            self.stopping.leave(self.trainer)

    def _settle_start(self) -> None:
        """Let the data know what the model begins with; a run that goes on has all of it in its own checkpoint."""
        if (place := getattr(self.model, "init_from", None)) is not None:
            place = str(self.resumed.checkpoint) if self.resumed else place
            self.model.init_from = self.datamodule.init_from = place

    def _compare(self, resumed: ResumedRun) -> None:
        """Say, or refuse, what is not as it was."""
        before = self.config_before or self.config
        here: dict[str, Any] = {
            "processes": self.trainer.world_size,
            "replicas": self.trainer.world_size // resolve_tensor_parallel_size(self.trainer.strategy),
            "seed": self.config.seed_everything,
        }
        if isinstance(self.datamodule, BaseDataModule):
            here["data"] = self.datamodule.fingerprint
        old, new = (config_to_dict(self.parser, config) for config in (before, self.config))
        resumed.compare(old, new, here, self.config.force)
        if not self.config.plan:
            self.provenance.changed = resumed.changed

    def _settle_in(self, folder: RunFolder | None, first_step: int) -> None:
        """Send all that the run writes into its folder; None on ranks that write nothing and ask the first."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
            if isinstance(callback, RunDirCallback):
                callback.folder = folder
        if self.config.trainer.logger in (None, True) and not (self.config.plan or self.config.trainer.fast_dev_run):
            path = folder.path if folder else Path(self.config.runs, self.config.experiment, "version_0")
            self.trainer.logger = TensorBoardLogger(
                path.parent.parent,
                path.parent.name,
                path.name,
                default_hp_metric=False,
                purge_step=first_step,  # points beyond the checkpoint, from before a kill, are logged again
            )


def main(args: ArgsType = None) -> None:
    """The door ``fit``."""
    silence_libraries()
    with exit_on_signal():
        cli = FitCLI(args)
        configure_process(processes=cli.trainer.num_devices)
        cli.fit()
