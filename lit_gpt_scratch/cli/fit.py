"""``fit``: LightningCLI with this project's defaults, run folders, help and error messages."""

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ProgressBar, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lit_gpt_scratch.callbacks.checkpointing import Checkpointing, RunDirCallback
from lit_gpt_scratch.callbacks.default_callbacks import default_callbacks
from lit_gpt_scratch.callbacks.event_logger import RunLogger, tolerate_logger_errors
from lit_gpt_scratch.callbacks.introspection import ActivationStats
from lit_gpt_scratch.callbacks.run_plan import RunPlan
from lit_gpt_scratch.callbacks.signal_handling import SignalHandling, exit_on_signal
from lit_gpt_scratch.callbacks.spike_guard import GAVE_UP_EXIT_CODE, GuardMode, guard_gave_up
from lit_gpt_scratch.callbacks.summary import BaselineMetrics, RunMetadata
from lit_gpt_scratch.callbacks.throughput import Throughput
from lit_gpt_scratch.checkpoint.checkpoint_plugins import (
    AtomicCheckpointIO,
    BackgroundCheckpointIO,
    ShardedCheckpointIO,
)
from lit_gpt_scratch.checkpoint.init_from import InitialModel
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.cli.budget import BudgetedRun, validate_alone
from lit_gpt_scratch.cli.config_defaults import (
    MAX_STEPS,
    apply_init_from,
    apply_preset,
    apply_task_defaults,
    describe_presets,
    resolve_built_defaults,
    resolve_defaults,
    restore_defaults_0_1,
)
from lit_gpt_scratch.cli.config_files import (
    FitParser,
    SaveConfig,
    config_to_dict,
    describe_experiments,
    parse_run_config,
    read_config,
)
from lit_gpt_scratch.cli.early_flags import EarlyFlags
from lit_gpt_scratch.cli.error_formatting import silence_libraries, user_errors
from lit_gpt_scratch.cli.hardware_plan import plan_for_machine
from lit_gpt_scratch.cli.help import HelpPage
from lit_gpt_scratch.cli.resume import ResumedRun
from lit_gpt_scratch.cli.trainer_flags import explain_trainer_error, validate_callbacks, validate_trainer_flags
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.distributed.hardware_defaults import configure_process
from lit_gpt_scratch.distributed.parallelize import validate_tensor_parallel
from lit_gpt_scratch.distributed.rank_monitor import RankMonitor
from lit_gpt_scratch.distributed.stop_signals import STOP_SIGNALS
from lit_gpt_scratch.distributed.strategies import (
    ModelParallel,
    build_named_strategy,
    replace_multiprocessing_launcher,
    resolve_groups,
    resolve_strategy,
    resolve_tensor_parallel_size,
    validate_cpu_offload,
)
from lit_gpt_scratch.distributed.validate_hardware import explain_out_of_memory, validate_hardware
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.lightning_compat import (
    collective_timeout,
    failed_child_processes,
    kill_child_processes,
    replace_launcher,
    set_collective_timeout,
    trains_in_this_process,
)
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.presets import PRESETS
from lit_gpt_scratch.profiling.accelerators import ACCELERATORS
from lit_gpt_scratch.profiling.flops_and_memory import require_model_fits_memory
from lit_gpt_scratch.schema import MAX_SEED
from lit_gpt_scratch.tasks.gpt_module import GPTModule
from lit_gpt_scratch.terminal_output import training_output

log = logging.getLogger(__name__)

RUN_DEFAULTS: Final[dict[str, str]] = {"runs": "runs", "experiment": "pretrain"}
CLEANING: Final = [{"class_path": "lit_gpt_scratch.text.duplicates.ExactDuplicates"}]
"""Default of ``PackedText.cleaning``, written as a config, because a config file cannot contain an instance."""


class FitCLI(LightningCLI):
    """Command-line interface that parses flags and configs, builds the trainer, task and data, and runs training.

    Raises:
        UserError: A flag, a config or a file is invalid; in this case, no files are left on disk.
    """

    help_page = HelpPage(
        usage="python -m lit_gpt_scratch.fit [--config FILE ...] [--flag value ...]",
        description=f"Train a GPT on real text, for {MAX_STEPS} steps if no limit on steps, epochs or time is set.",
    )

    def __init__(self, args: ArgsType = None) -> None:
        with user_errors():
            super().__init__(
                model_class=LightningModule,
                datamodule_class=LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_callback=None,  # it would use the logger's folder; SaveConfig uses the run folder
                trainer_defaults={
                    "gradient_clip_val": 1.0,
                    "check_val_every_n_epoch": None,
                    "num_sanity_val_steps": 0,
                    "enable_model_summary": False,
                    "use_distributed_sampler": False,  # the data modules shard and order the samples
                },
                parser_class=FitParser,
                parser_kwargs={"allow_abbrev": False, "exit_on_error": False},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=args,
                run=False,
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the flags that do not belong to the trainer, the model or the data."""
        parser.add_argument("--runs", default=RUN_DEFAULTS["runs"], help="Folder that contains all runs.")
        parser.add_argument(
            "--experiment",
            default=RUN_DEFAULTS["experiment"],
            help="Name of the experiment; runs with the same experiment name are numbered consecutively.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to resume from: a file, a run folder, 'last' for the newest run of this experiment, or "
            "'auto' for the newest run if there is one and a new run otherwise. The run continues in the same folder, "
            "with the same flags.",
        )
        parser.add_argument(
            "--preset",
            type=str | None,
            default=None,
            help=f"Named architecture: {', '.join(PRESETS)}, or 'list' to print their sizes. Flags and config files "
            "override its settings.",
        )
        parser.add_argument(
            "--budget",
            type=str | None,
            default=None,
            help="Time (2min, 1.5h) or compute (1e15flops) for which depth, width, heads, batch, learning rate and "
            "number of steps are chosen, from a scaling law and the speed of this machine. Flags override each choice.",
        )
        parser.add_argument(
            "--scaling_law",
            type=str | None,
            default=None,
            help="With --budget, scaling_law.json of a sweep on your own text; the default was fitted to Python source "
            "code.",
        )
        parser.add_argument(
            "--tensor_parallel",
            type=int | None,
            default=None,
            help="Tensor-parallel size: number of processes that share one model replica, for --trainer.strategy tp "
            "(default: all processes), fsdp2_tp (default: 2) and hsdp (default: 1).",
        )
        parser.add_argument(
            "--hsdp_groups",
            type=int | None,
            default=None,
            help="Number of groups of processes that each hold all weights, sharded within the group, for "
            "--trainer.strategy hsdp (default: one group per machine).",
        )
        parser.add_argument(
            "--cpu_offload",
            type=bool,
            default=False,
            help="Keep the sharded weights, gradients and optimizer state in the memory of the CPU, and update them "
            "there, for --trainer.strategy fsdp2 and hsdp on GPUs.",
        )
        parser.add_argument(
            "--collective_timeout",
            type=timedelta | None,
            default=None,
            help="Time after which a run ends with an error because a process waits for another one that does not "
            "respond, as hours:minutes:seconds (default: half an hour).",
        )
        parser.add_argument(
            "--guard",
            type=GuardMode,
            default="warn",
            help="Check the loss and the gradient norm of each optimizer step. 'warn' reports outliers and values that "
            "are not finite. 'act' also skips these steps, and rewinds the run to the last good checkpoint if skipping "
            "does not help; a run that does not recover ends with exit code 3. 'off' disables the check.",
        )
        parser.add_argument(
            "--force",
            action="store_true",
            help="Resume even if the flags, the seed or the training text differ from those of the checkpoint's run. A "
            "different architecture, tokenizer or optimizer class is always an error.",
        )
        parser.add_argument(
            "--trust",
            type=str | list[str] | None,
            default=None,
            help="Import path of a custom class or function that files from other people (the config.yaml of a resumed "
            "run, the pretrained model or a reward model) may import. Code in other flags and in --config is trusted.",
        )
        parser.add_argument(
            "--plan",
            action="store_true",
            help="Print a description of the run, estimate its duration from a few steps, and exit without creating a "
            "run folder.",
        )
        parser.add_argument(
            "--devices_like",
            type=str | None,
            default=None,
            help="With --plan, predict memory and speed on a machine such as 8xh200 or 2x8xh100 instead of measuring "
            f"this one; no GPU, text or memory for the model is needed. Accelerators: {', '.join(ACCELERATORS)}.",
        )
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
        """Parse the flags; if a run is resumed, flags that are not given keep their values from its ``config.yaml``.

        The config of a resumed run is also parsed on its own, to find the flags that have changed.
        """
        early = EarlyFlags.scan(list(sys.argv[1:] if args is None else args))
        self._answer_questions(parser, early)

        def is_given(flag: str) -> bool:
            return early.get(flag) is not None

        if (budget := early.get("budget")) is not None:
            validate_alone(budget, is_given)
        self.resumed: ResumedRun | None = None
        self.config_before: Namespace | None = None
        before: list[str] = []
        if (checkpoint := early.get("ckpt_path")) is not None:
            runs, experiment = (early.get(name) or default for name, default in RUN_DEFAULTS.items())
            self.resumed = ResumedRun.find(checkpoint, Path(runs), experiment)
            if self.resumed:
                self.resumed.require_folder(early.on_command_line("runs"), early.on_command_line("experiment"))
        if self.resumed and self.resumed.folder and self.resumed.folder.config.is_file():
            before = ["--config", str(self.resumed.folder.config)]
            self.config_before = parse_run_config(parser, self.resumed.folder.config, early.trusted)
            restore_defaults_0_1(self.config_before, read_config(before[1]))
            resolve_defaults(self.config_before)
        apply_preset(parser, early.get("preset"))
        init_from = early.get("model.init_from")
        self.initial_model: InitialModel | None = None
        self.trusted = early.trusted
        if self.resumed is None:
            task, preset = early.class_of("model"), early.get("preset")
            apply_task_defaults(parser, task)
            self.initial_model = apply_init_from(parser, init_from, task, preset, self.trusted)
        self.config = parser.parse_args([*before, *early.flags])
        found = self.config.get("model.init_args.init_from")
        if (
            self.resumed is None and found is not None and found != init_from
        ):  # set in a file that only the parser opens
            task, preset = self.config.model.class_path, self.config.preset
            self.initial_model = apply_init_from(parser, found, task, preset, self.trusted)
            self.config = parser.parse_args(early.flags)
        if self.config.devices_like is not None:
            if not self.config.plan:
                raise UserError(f"--devices_like is {self.config.devices_like}, but --plan is not set; add --plan")
            if self.config.trainer.precision is None:  # of that machine, not of this one
                self.config.trainer.precision = "bf16-mixed"
        resolve_defaults(self.config)
        self.budget: BudgetedRun | None = None
        if self.config.budget is not None:
            self.budget = BudgetedRun(self.config, is_given)
        elif self.config.scaling_law is not None:
            raise UserError("--scaling_law is set, but --budget is not; add --budget")
        validate_trainer_flags(self.config.trainer)
        if not 0 <= self.config.seed_everything <= MAX_SEED:
            raise UserError(f"--seed_everything is {self.config.seed_everything}; it must be from 0 to {MAX_SEED}")
        if early.print_config:  # not by the parser, so that the printed defaults are resolved
            sys.stdout.write(parser.dump(self.config, skip_unset=False))
            sys.exit(0)

    def _answer_questions(self, parser: LightningArgumentParser, early: EarlyFlags) -> None:
        """Print the help, the presets or the experiments and exit, if the flags request one of them."""
        if early.help is not None:
            print(self.help_page.render(parser, early.help, early.class_of("model"), early.class_of("data")))
        elif early.lists is not None:
            print(describe_presets() if early.lists == "--preset" else describe_experiments())
        else:
            return
        sys.exit(0)

    def before_instantiate_classes(self) -> None:
        """Choose the model for ``--budget``."""
        if self.budget is not None:
            with explain_out_of_memory(None):
                self.budget.choose_model()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; convert its exceptions to a ``UserError`` that names the flags that may be the cause.

        With ``--devices_like``, print the plan for that machine and exit instead.
        """
        if self.config.devices_like is not None:
            for name, text in plan_for_machine(self.config, self.config_init, self.model, self.datamodule):
                log.log(logging.WARNING if name == "warning" else logging.INFO, "%-11s %s", name, text)
            sys.exit(0)
        config = {**self.config_init.trainer, **kwargs}
        config["strategy"] = build_named_strategy(config["strategy"])
        validate_hardware(config, self.config_init.cpu_offload)
        settings = self.config_init.tensor_parallel, self.config_init.hsdp_groups, self.config_init.cpu_offload
        config["strategy"] = resolve_strategy(config["strategy"], *settings)
        if isinstance(config["callbacks"], Callback):
            config["callbacks"] = [config["callbacks"]]
        validate_callbacks(config["callbacks"] or [])
        given = dict(config)
        if self.config_init.plan:
            config |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            limit = config["overfit_batches"] or config["limit_val_batches"]
            config["callbacks"] = [
                *(config["callbacks"] or []),
                Throughput(),
                BaselineMetrics(limit),
                RunPlan(only=True, limit_val_batches=limit),
            ]
        else:
            config["callbacks"] = [*(config["callbacks"] or []), *self._callbacks(config)]
        try:
            trainer = Trainer(**config)
        # Unknown strategy, missing library, or flags or cluster variables that contradict each other.
        except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise explain_trainer_error(error, given, self.parser.get_defaults().trainer) from error
        if self.config_init.collective_timeout is not None:
            set_collective_timeout(trainer.strategy, self.config_init.collective_timeout)
        if self.config_init.plan:
            trainer.limit_val_batches = 0
        if (method := replace_multiprocessing_launcher(trainer.strategy)) and trainer.is_global_zero:
            log.info(
                "start method %s is not supported; each process runs this script, as with --trainer.strategy ddp",
                method,
            )
        replace_launcher(trainer.strategy)
        if isinstance(self.model, GPTModule):  # before other processes start, so that the error is printed once
            self.model.trusted |= self.trusted
            adapters = self.model.lora is not None
            size = resolve_tensor_parallel_size(trainer.strategy)
            groups = resolve_groups(trainer.strategy)  # checks the number of processes
            if getattr(trainer.strategy, "cpu_offload", False):
                validate_cpu_offload(size, str(trainer.precision))
            validate_tensor_parallel(self.model.gpt, size, str(trainer.precision), adapters)
            device = trainer.strategy.root_device
            if device.type == "cpu" and not self.model.gpt.custom_classes:  # before the data is prepared
                n_shards = trainer.world_size // groups if isinstance(trainer.strategy, ModelParallel) else 1
                with trainer.precision_plugin.module_init_context():
                    require_model_fits_memory(
                        self.model.gpt, 1, 1, device, n_shards, trainer.num_devices, self.model.is_mostly_frozen
                    )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # keep a user's plugin
            saving = self.config_init.checkpoint
            checkpoint_io = ShardedCheckpointIO() if saving.format == "sharded" else AtomicCheckpointIO()
            trainer.strategy.checkpoint_io = (
                BackgroundCheckpointIO(checkpoint_io) if saving.background else checkpoint_io
            )
        return trainer

    def _callbacks(self, config: Mapping[str, Any]) -> list[Callback]:
        saves, shows_progress = (config[f"enable_{name}"] is not False for name in ("checkpointing", "progress_bar"))
        own: list[Callback] = config["callbacks"] or []
        shows_progress = shows_progress and not any(isinstance(callback, ProgressBar) for callback in own)
        max_time_is_a_flag = not any(isinstance(callback, Timer) for callback in own)  # a Timer overrides the flag
        saving = self.config_init.checkpoint if saves else None
        self.stopping, self.provenance = SignalHandling(saving), RunMetadata()
        written = [SaveConfig(self.parser, self.config), self.provenance]
        guard = self.config_init.guard
        return default_callbacks(
            written, self.config_init.inspect, self.stopping, saving, shows_progress, guard, max_time_is_a_flag
        )

    def fit(self) -> None:
        """Prepare the data, create the run folder, and train.

        Raises:
            UserError: The data, the run folder or the checkpoint is unusable, another process is training in the
                folder, or no steps are left to train. A run folder created by this call is removed.
            SystemExit: The process received a termination signal, or the spike guard has stopped the run.
        """
        writes_nothing = self.config.plan or self.config.trainer.fast_dev_run
        folder = self.resumed.folder if self.resumed and not writes_nothing else None
        claimed = None
        try:
            with user_errors(), explain_out_of_memory(self.datamodule), ExitStack() as ownership:
                if (
                    folder and self.trainer.is_global_zero
                ):  # lock before reading its checkpoint, which another process may replace
                    ownership.enter_context(folder.lock())
                first_step = self.resumed.steps_done(self.trainer, self.config.force) if self.resumed else 0
                self._load_initial_model()
                # Before the folder is created, so that invalid data does not leave one behind.
                self.datamodule.prepare_data()
                self.datamodule.setup("fit")
                if self.resumed:
                    self._compare(self.resumed)
                if self.budget is not None:
                    self.budget.choose_length(self.trainer, self.model, self.datamodule)
                    for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
                        if isinstance(callback, RunPlan):
                            callback.budget = self.budget.reasons
                resolve_built_defaults(self.config, self.trainer.strategy.root_device, self.datamodule)
                if folder is None and self.trainer.is_global_zero and not writes_nothing:
                    folder = claimed = RunFolder.create(Path(self.config.runs), self.config.experiment)
                    ownership.enter_context(folder.lock())
                    if self.config.ckpt_path == "auto":
                        folder.require_only_run()
                self._set_run_folder(folder, first_step)
                checkpoint = self.resumed.checkpoint if self.resumed else None
                monitor = self._monitor_ranks(claimed, folder.path if folder else None)
                self._connect_when_ready(monitor)
                with monitor, user_errors(), explain_out_of_memory(self.datamodule):
                    self.trainer.fit(self.model, self.datamodule, ckpt_path=checkpoint)
                    if self.trainer.global_step == 0:
                        raise UserError("no training steps ran; increase --trainer.max_steps or --trainer.max_epochs")
                    has_tests = getattr(self.datamodule, "test_dataset", None)
                    if has_tests and not writes_nothing and not self.stopping.signum:
                        best = self._checkpoint_to_test()
                        self.trainer.test(self.model, self.datamodule, ckpt_path=best, verbose=False)
        except BaseException:  # including signals: other ranks would wait for this one
            kill_child_processes(self.trainer)
            raise
        finally:
            if claimed and not self.trainer.global_step and not claimed.last_saved_at():
                claimed.delete()
        if not self.config.plan and self.stopping.signum:  # the signal came after the last step
            self.stopping.leave(self.trainer)
        if guard_gave_up(self.trainer):
            raise SystemExit(GAVE_UP_EXIT_CODE)

    def _checkpoint_to_test(self) -> Path | None:
        """Return the checkpoint to test: the one with the lowest validation loss, or None to test the final weights."""
        saving = self.trainer.checkpoint_callback
        tests_best = isinstance(self.model, GPTModule) and self.model.tests_best
        best = saving.best_checkpoint() if tests_best and isinstance(saving, Checkpointing) else None
        if best is None or best.name == f"step={self.trainer.global_step}.ckpt":
            return None
        log.info("testing %s, which has the lowest validation loss", best.name)
        return best

    def _monitor_ranks(self, claimed: RunFolder | None, folder: Path | None) -> RankMonitor:
        """Build the ``RankMonitor``, which calls ``clean_up`` before it terminates this process."""
        trainer = self.trainer

        def clean_up() -> None:
            kill_child_processes(trainer)
            if claimed and not claimed.last_saved_at():
                claimed.delete()

        ranks = trainer.world_size if trains_in_this_process(trainer) else 1
        timeout = collective_timeout(trainer)
        return RankMonitor(
            trainer.global_rank, ranks, trainer.num_nodes, timeout, STOP_SIGNALS, clean_up, trainer.local_rank,
            lambda: failed_child_processes(trainer), folder,
        )  # fmt: skip

    def _connect_when_ready(self, monitor: RankMonitor) -> None:
        """Connect the monitor once all ranks are running."""

        def setup(trainer: Trainer, module: LightningModule, stage: str) -> None:
            if stage == "fit":
                monitor.connect(trainer.strategy.broadcast(uuid4().hex))

        self.trainer.callbacks.insert(0, LambdaCallback(setup=setup))  # type: ignore[attr-defined]  # the trainer sets it late

    def _load_initial_model(self) -> None:
        """Read the pretrained model once, for both model and data; a resumed run uses its checkpoint instead."""
        place = getattr(self.model, "init_from", None)
        if place is None:
            return
        if self.resumed:
            place = str(self.resumed.checkpoint)
        initial = self.initial_model or InitialModel.read(place)
        self.initial_model = None  # the model frees it once its network is built
        self.model.init_from = self.datamodule.init_from = place
        self.model.initial_model, self.datamodule.initial_tokenizer = initial, initial.tokenizer

    def _compare(self, resumed: ResumedRun) -> None:
        """Log changes to the flags and environment since the run started; reject those that make it a different run."""
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

    def _set_run_folder(self, folder: RunFolder | None, first_step: int) -> None:
        """Set the folder that callbacks and the logger write to; ``folder`` may be None on ranks that write nothing."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
            if isinstance(callback, RunDirCallback):
                callback.folder = folder
        if self.config.trainer.logger in (None, True) and not (self.config.plan or self.config.trainer.fast_dev_run):
            if folder and self.trainer.is_global_zero:
                folder.order_events()
            path = folder.path if folder else Path(self.config.runs, self.config.experiment, "version_0")
            # Steps that a killed run logged after its last checkpoint are logged again.
            self.trainer.logger = RunLogger(path, first_step)
        for logger in self.trainer.loggers:
            tolerate_logger_errors(logger)


def main(args: ArgsType = None) -> None:
    """Run the ``fit`` command."""
    silence_libraries()
    with exit_on_signal():
        cli = FitCLI(args)
        configure_process(processes=cli.trainer.num_devices)
        with training_output():
            cli.fit()
