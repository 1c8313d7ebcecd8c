"""Base LightningModule: a GPT with optimizer, loss normalization, gradient clipping, metrics and exact resumption."""

import inspect
import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer
from torchmetrics import Metric, MetricCollection

from lit_gpt_scratch.batch_types import STEP_KEYS, BatchLayout, DataInfo
from lit_gpt_scratch.checkpoint.adapters import hash_base_weights
from lit_gpt_scratch.checkpoint.init_from import InitialModel, copy_weights, has_same_head, resolve_context
from lit_gpt_scratch.checkpoint.loop_state import BATCH_LAYOUT_KEY, normalize_progress, rescale_batch_counts
from lit_gpt_scratch.checkpoint.metadata import (
    METADATA_KEY,
    CheckpointMetadata,
    require_same_model,
    require_same_tokenizer,
)
from lit_gpt_scratch.checkpoint.training_state import validate_training_state
from lit_gpt_scratch.distributed.hardware_defaults import explain_no_compile
from lit_gpt_scratch.distributed.parallelize import count_shards, parallelize, reduce_tp_gradients
from lit_gpt_scratch.distributed.strategies import ModelParallel as ModelParallel  # registers the strategies' names
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.kernels.compiler_backend import CompilerBackend
from lit_gpt_scratch.lightning_compat import global_seed, planned_steps, set_logging_step, staged_accumulation
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.activation_checkpointing import ActivationCheckpointing, validate_checkpointing
from lit_gpt_scratch.model.attention import validate_attention_backend
from lit_gpt_scratch.model.attention_registry import resolve_attention_class
from lit_gpt_scratch.model.feed_forward import MixtureOfExperts, resolve_feed_forward_class
from lit_gpt_scratch.model.lora import LoRA, add_lora
from lit_gpt_scratch.model.output_heads import OutputHead, TokenHead
from lit_gpt_scratch.model.weight_sampler import draw_seed
from lit_gpt_scratch.optim import Muon, OptimizerRecipe, Schedule
from lit_gpt_scratch.optim.ema import ExponentialMovingAverage
from lit_gpt_scratch.optim.gradient_clipping import clip_grad_norm, clip_grad_value, gradients_of, total_grad_norm
from lit_gpt_scratch.optim.optimizer_state import validate_optimizer_state
from lit_gpt_scratch.profiling.flops_and_memory import require_model_fits_memory
from lit_gpt_scratch.tasks.expert_balancing import EXPERT_LOAD_KEY, ExpertBalancing, find_tokens

log = logging.getLogger(__name__)

TRAIN_STREAM, VALIDATION_STREAM = 5, 10
"""Stream ids that are part of every random seed, so that training and validation use different random numbers.

Changing a value changes the random numbers of all runs.
"""


class StepFilter(Protocol):
    """Callable that decides whether a computed optimizer step is applied."""

    def __call__(self, loss: Tensor, norm: Tensor) -> bool:
        """Return whether to apply the step; called after gradient clipping, with the same arguments on every rank.

        Args:
            loss: Mean loss of the step over all ranks, a scalar.
            norm: Gradient norm before clipping, a scalar.
        """


class GPTModule(L.LightningModule):
    """Base class of all training stages: a GPT and its training objective.

    Subclasses override ``loss_and_count``, ``build_metrics`` and ``update_metrics``; those that do not predict tokens
    also override ``output_head``. ``__init__`` only validates and stores the arguments. The network is built in
    ``configure_model``, when the hardware and the vocabulary are known.

    A run can be resumed bit for bit from any of its checkpoints. Lightning restores the weights, the optimizer, the
    schedule and the progress counters; the counters are normalized first. The data module determines the next batch
    from the progress of the trainer. Random numbers depend only on the seed, the batch index and the rank, so no
    generator state is saved. If a run is resumed with a different number of processes or micro-batches, it trains on
    the same rows in the same order, but with different random numbers.

    Args:
        gpt: Model architecture. By default, the architecture of ``init_from`` if it is set, otherwise a small GPT.
        optimizer: Optimizer and its hyperparameters.
        schedule: Learning-rate schedule.
        init_from: Pretrained model to start from: a run folder, a checkpoint, a ``.safetensors`` file, or a Hugging
            Face folder.
        lora: LoRA settings. If set, only the low-rank adapters are trained, plus the output head if it is newly
            initialized.
        train_layers: Number of blocks to train, counted backward from the last block. If set, only these blocks, the
            final norm and the output head are trained. A head that is tied to the embedding stays frozen, unless it is
            newly initialized.
        ema_decay: Decay of an exponential moving average (EMA) of the weights, such as 0.999. The averages are used for
            validation and sample generation, are saved as the weights in checkpoints, and replace the weights after
            training. By default, averaging is disabled.
        compile: What to compile with ``torch.compile``: ``blocks`` (the default) compiles the transformer blocks if the
            machine supports compilation and its compiler works. ``true`` also compiles other parts of the training
            step, which increases the startup time, and raises an error if compilation is not supported or fails.
            ``false`` disables compilation.
        activation_checkpointing: What each block stores for the backward pass: by default, all activations. ``true``
            stores only the input of the block and recomputes its activations, which saves the most memory, but
            requires about a third more compute. ``keep_attention`` also stores the output of fused attention, and
            ``keep_matmuls`` the outputs of all matmuls, so that fewer operations are recomputed; neither supports
            dropout.

    Raises:
        UserError: The architecture has a custom class that cannot be imported, or arguments contradict each
            other.
    """

    net: GPT
    metrics: Metric | MetricCollection
    """Validation and test metrics, built by ``build_metrics``."""
    data_info: DataInfo
    """Properties of the data, provided by the data module; set before the network is built."""
    next_command: ClassVar[str | None] = None
    """Command to suggest after training; ``{}`` is replaced with the run directory.

    If None, the data module's command is suggested.
    """
    returns_label_losses: ClassVar[bool] = False
    """Whether ``update_metrics`` returns the loss of each label, which ``LossBreakdown`` requires."""
    default_epochs: ClassVar[int | None] = None
    """Number of epochs of a ``fit`` run for which no limit on steps, epochs or time is set; such a run is validated
    after each epoch. If None, the run has the default number of steps instead."""
    argument_defaults: ClassVar[Mapping[str, Any]] = {}
    """Default arguments of this task that ``fit`` applies instead of those of ``GPTModule``, keyed by argument name."""
    optimizer_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Default optimizer arguments that override those of the optimizer class, keyed by the name of that class."""
    tests_best: ClassVar[bool] = False
    """Whether ``fit`` tests the checkpoint with the lowest validation loss instead of the final weights."""
    predicts_ahead: ClassVar[bool] = False
    """Whether the task trains the modules for multi-token prediction. Other tasks build a network without them."""
    allows_dropout: ClassVar[bool] = True
    """Whether dropout is allowed in training.

    Dropout is not allowed if the loss compares log-probabilities from separate forward passes, because dropout would
    add noise to their ratio. In that case, the dropout of an initial model is disabled, and enabling dropout
    raises an error.
    """

    def __init__(
        self,
        gpt: GPTConfig | None = None,
        optimizer: OptimizerRecipe = Muon(),  # noqa: B008 - an instance, so that --model.optimizer.lr works
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        init_from: str | None = None,
        lora: LoRA | None = None,
        train_layers: int | None = None,
        ema_decay: float | None = None,
        compile: bool | Literal["blocks"] | None = None,
        activation_checkpointing: ActivationCheckpointing = False,
    ) -> None:
        super().__init__()
        if lora is not None and train_layers is not None:
            raise UserError(
                "model.lora and model.train_layers both select the trained parameters; set only one of them"
            )
        if train_layers is not None and train_layers < 0:
            raise UserError(f"model.train_layers is {train_layers}; it must be 0 or more")
        for part, dropout in {"gpt": gpt and gpt.dropout, "lora": lora and lora.dropout}.items():
            if dropout and not self.allows_dropout:
                raise UserError(
                    f"model.{part}.dropout is {dropout}, but {type(self).__name__} does not support dropout, because "
                    "it compares log-probabilities from separate forward passes; set it to 0"
                )
        if gpt is not None and gpt.multi_token_depth:
            obstacle = None if self.predicts_ahead else f"{type(self).__name__} does not predict several tokens"
            if lora is not None or train_layers is not None:
                obstacle = "model.lora and model.train_layers would freeze the modules that it adds"
            if obstacle:
                raise UserError(f"model.gpt.multi_token_depth is {gpt.multi_token_depth}, but {obstacle}; set it to 0")
        if gpt is not None:
            resolve_attention_class(gpt.attention).validate(gpt)
            resolve_feed_forward_class(gpt.feed_forward)
        self._gpt = gpt
        self.optimizer = optimizer
        self.schedule = schedule
        self.init_from = init_from
        self.initial_model: InitialModel | None = None
        """Model read from ``init_from``, or None before it is read and after the network is built. Callers that have
        already read the checkpoint can set this attribute, so that the checkpoint is not read again."""
        self.trusted: frozenset[str] = frozenset(gpt.custom_classes.values() if gpt else ())
        """Import paths that ``init_from`` and other checkpoints may import: by default, only the custom classes in
        ``gpt``; ``fit`` adds the import paths in ``--trust``."""
        self.lora = lora
        self.train_layers = train_layers
        self.compile_network = compile
        self.activation_checkpointing = activation_checkpointing
        self.ema = ExponentialMovingAverage(ema_decay)
        self.total_steps = float("inf")
        """Number of optimizer steps in the run; infinite until it is known."""
        self.step_filter: StepFilter | None = None
        """Filter that can reject optimizer steps; None applies all steps.

        Rejected steps are counted, but do not change the weights, the averages or the optimizer state.
        """
        self.step_loss: Tensor | None = None
        """Mean loss of the current optimizer step over all ranks; computed only for logging and for ``step_filter``."""
        self.auxiliary_losses: dict[str, tuple[float, Tensor]] = {}
        """Auxiliary losses of the last batch that was passed to ``loss_and_count``, keyed by metric name: the weight of
        each loss, and its sum, which is divided by the same number of labels."""
        self.head_is_new = False
        """Whether the output head was initialized from scratch, because the initial model has a different head."""
        self._base_hash: str | None = None

    # Methods for subclasses to override.

    @property
    def output_head(self) -> OutputHead:
        """Output head of the network, which predicts tokens by default."""
        return TokenHead()

    def loss_and_count(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the summed loss of a batch and the number (or total weight) of its labels, as scalars.

        If there are auxiliary losses, ``auxiliary_losses`` is set, too.
        """
        raise NotImplementedError

    def step_count(self, batch: Any) -> Tensor:
        """Return the number (or total weight) of labels in the optimizer step that contains a batch, as a scalar."""
        count: Tensor = batch["step_labels"]
        return count

    def build_metrics(self) -> Metric | MetricCollection:
        """Build the validation and test metrics; their ``compute`` returns scalars keyed by name."""
        raise NotImplementedError

    def update_metrics(self, batch: Any) -> Tensor | None:
        """Add a batch to ``metrics``.

        Returns:
            The loss of each label, of shape (B, T), or (B,) if each row has a single label; None if the loss is not a
            sum over labels. Positions without a label have a loss of 0. Callbacks receive the losses in the output of
            ``validation_step``.
        """
        raise NotImplementedError

    def compute_metrics(self) -> dict[str, Tensor]:
        """Return the values of ``metrics`` as scalars keyed by name."""
        values: dict[str, Tensor] = self.metrics.compute()
        return values

    def build_auxiliary_networks(self) -> Sequence[GPT]:
        """Build additional networks, such as a reference model, and return the networks that must be sharded.

        They must have the same initial weights as ``net``, which may be on the meta device.
        """
        return ()

    @property
    def loss_chunk_size(self) -> int | None:
        """Number of positions whose logits are held in memory at once, or None if those of all positions are."""
        return None

    @property
    def trained_module(self) -> nn.Module:
        """Module whose parameters the optimizer updates."""
        return self.net

    def split_batch(self, batch: Any) -> list[Any]:
        """Split a batch into single-row batches, or return an empty list if the rows are generated rollouts."""
        rows = {name: values for name, values in batch.items() if name not in STEP_KEYS}
        return [{name: values[row : row + 1] for name, values in rows.items()} for row in range(len(batch["labels"]))]

    # Setup: data, network, optimizer.

    def setup(self, stage: str) -> None:
        """Read ``data_info`` from the data module.

        Lightning calls this hook after the data module's ``setup``.

        Raises:
            UserError: The trainer was given dataloaders instead of a data module, so the vocabulary is unknown.
        """
        self._read_data_info()
        self._global_seed = global_seed()
        if stage == "fit":
            self.ema.active = False  # train the current weights, even if they are the averages of an earlier run

    def _read_data_info(self) -> None:
        """Set ``data_info``; no other method accesses the data module."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if inspect.getattr_static(data, "info", None) is None:  # static, so as not to hide errors in ``info``
            raise UserError(f"{type(self).__name__} requires a data module; call trainer.fit(model, datamodule=...)")
        self.data_info = data.info

    @cached_property
    def gpt(self) -> GPTConfig:
        """Model config: the ``gpt`` argument, or else the config of ``init_from``, or else the default config.

        Raises:
            UserError: The config of ``init_from`` refers to code that is not trusted.
        """
        if self._gpt is not None:
            return self._gpt
        initial = self._initial_model()
        gpt = GPTConfig() if initial is None else initial.build_config(self.trusted)
        if self.is_mostly_frozen or not self.predicts_ahead:
            gpt = replace(gpt, multi_token_depth=0)
        return gpt if self.allows_dropout else replace(gpt, dropout=0.0)

    def _initial_model(self) -> InitialModel | None:
        if self.initial_model is None and self.init_from is not None:
            self.initial_model = InitialModel.read(self.init_from)
        return self.initial_model

    def configure_model(self) -> None:
        """Build the network for the vocabulary and context length of the data; further calls have no effect.

        Raises:
            UserError: The network does not fit into memory, its attention cannot be trained on this device, or it does
                not match the initial model.
        """
        if hasattr(self, "net"):
            return
        if not hasattr(self, "data_info"):  # Lightning's WeightAveraging calls this hook before ``setup``
            self._read_data_info()
        device, data = self.trainer.strategy.root_device, self.data_info
        vocab_size, block_size = data.vocab_size, data.block_size
        initial = self._initial_model()
        pretrained = None if initial is None else initial.open_weights(self.trusted)
        if pretrained is not None:
            trained = pretrained.metadata
            require_same_tokenizer(trained, data.tokenizer_json)
            vocab_size, block_size = trained.vocab_size, resolve_context(trained, self.gpt, block_size)
        validate_attention_backend(self.gpt, device)
        validate_checkpointing(self.activation_checkpointing, self.gpt)
        cpu_offload = getattr(self.trainer.strategy, "cpu_offload", False)
        weights_device = torch.device("cpu") if cpu_offload else device
        n_shards, local_processes = count_shards(self.device_mesh), self.trainer.num_devices
        sizes = vocab_size, block_size
        require_model_fits_memory(self.gpt, *sizes, weights_device, n_shards, local_processes, self.is_mostly_frozen)
        seed = self.trainer.strategy.broadcast(draw_seed())  # each process initializes its own shards
        is_sharded = self.device_mesh is not None  # it is never allocated as a whole
        with torch.device("meta") if is_sharded else nullcontext():
            self.net = GPT(self.gpt, vocab_size, block_size, self.output_head, seed)
        self.head_is_new = pretrained is not None and not has_same_head(pretrained, self.net)
        if pretrained is not None and not is_sharded:
            copy_weights(pretrained, self.net)
        # A resumed run starts from its own checkpoint; a head that was new at the start of the run still counts as new.
        self._trains_new_head = pretrained is None or self.head_is_new or pretrained.metadata.new_head
        if pretrained is None and (self.lora or self.train_layers is not None):
            log.warning("model.init_from is not set, so frozen weights stay random; set it to a pretrained model")
        if pretrained is not None and self.lora:
            self._base_hash = hash_base_weights(pretrained.weights, self._trains_new_head)
        self._freeze(seed)
        auxiliary = self.build_auxiliary_networks()
        self.net.activation_checkpointing = self.activation_checkpointing
        if self.device_mesh is not None:
            for net in (self.net, *auxiliary):  # a copy of the network gets the same weights
                parallelize(net, self.device_mesh, str(self.trainer.precision), cpu_offload)
                net.materialize(weights_device, seed)
                if pretrained is not None:
                    copy_weights(pretrained, net)
        self.initial_model = None  # free its memory
        has_experts = any(isinstance(block.feed_forward, MixtureOfExperts) for block in self.net.blocks)
        self.expert_balancing = ExpertBalancing(self.net) if has_experts else None
        """Auxiliary losses and load of the experts, if the blocks are mixtures of experts."""
        self.metrics = self.build_metrics()

    @property
    def is_mostly_frozen(self) -> bool:
        """Whether only adapters or some of the layers are trained."""
        return self.lora is not None or self.train_layers is not None

    def _freeze(self, seed: int) -> None:
        """Freeze the parameters that ``lora`` or ``train_layers`` excludes from training, except for a new output head.

        Args:
            seed: Random seed of the initial adapters.

        Raises:
            UserError: ``lora.pattern`` matches an output head that is tied to the embedding.
        """
        tied = self.net.head.weight is self.net.embedding.weight
        if self.lora is not None:
            names = add_lora(self.net, self.lora, seed)
            if tied and "head" in names:
                raise UserError(
                    f"model.lora.pattern is {self.lora.pattern}, which matches the head, but the head is tied to "
                    f"the embedding; exclude the head, for example with (^|\\.)blocks\\."
                )
            if self._trains_new_head:
                self.net.head.requires_grad_(True)
        elif self.train_layers is not None:
            self.net.requires_grad_(False)
            blocks = self.net.blocks[max(0, len(self.net.blocks) - self.train_layers) :]
            head = [] if tied and not self._trains_new_head else [self.net.head]
            for module in (*blocks, self.net.norm, *head):
                module.requires_grad_(True)

    @property
    def trains_only_adapters(self) -> bool:
        """Whether only adapters are trained, so that disabling them restores the initial model."""
        return self.lora is not None and not self._trains_new_head

    def on_fit_start(self) -> None:
        """Compile the blocks in place, so that parameter names in checkpoints stay the same.

        Identical blocks share one compilation, so a deep network compiles as fast as a shallow one.

        Raises:
            UserError: Compilation was requested, but is not supported on this machine.
        """
        obstacle = explain_no_compile(self.device, requested=self.compile_network is True)
        if self.compile_network is True and obstacle:
            raise UserError(f"model.compile: {obstacle}")
        if obstacle is None and self.compile_network is not False:
            backend = CompilerBackend(required=self.compile_network is True)
            # After the first change of a shape, torch would compile for any shape, which is slower: if windows grow,
            # blocks are compiled for each of their few lengths.
            dynamic = None if self.data_info.shortest_window is None else False
            for block in self.net.all_blocks:
                block.compile(backend=backend, dynamic=dynamic)

    @property
    def compiled(self) -> bool:
        """Whether the network is compiled."""
        return any(block._compiled_call_impl is not None for block in self.net.blocks)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer and the learning-rate scheduler, which is stepped after every optimizer step."""
        optimizer = self.optimizer.build(self.trained_module)
        optimizer.register_load_state_dict_pre_hook(validate_optimizer_state)
        optimizer.register_step_post_hook(self._on_optimizer_step)
        self.configured_groups = [dict(group) for group in optimizer.param_groups]
        """Parameter groups as configured, independent of the optimizer state in a checkpoint."""
        self.ema.attach(optimizer, lambda: self.trainer.global_step)
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Training.

    def on_train_start(self) -> None:
        """Determine the number of steps in the run, and switch from the averaged weights to the current weights.

        This cannot happen earlier: estimating the number of steps creates the training dataloader, which must not be
        created before the trainer has restored its position.
        """
        self._use_ema(False)  # checkpoints store the averages as weights
        self.total_steps = planned_steps(self.trainer)
        self._apply_configured_hyperparameters()
        self._loss_sum = torch.zeros((), device=self.device)
        self._starts, self._rejects_step = True, False
        self._auxiliary_sums: dict[str, Tensor] = {}

    def _apply_configured_hyperparameters(self) -> None:
        """Replace the optimizer hyperparameters of a checkpoint with the configured ones.

        The rest of the optimizer state is kept.
        """
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        scheduler.base_lrs = [group["lr"] for group in self.configured_groups]
        factor = self.schedule.factor(self.trainer.global_step, self.total_steps)
        for group, configured in zip(self.trainer.optimizers[0].param_groups, self.configured_groups, strict=True):
            group.update({name: value for name, value in configured.items() if name != "params"})
            group["initial_lr"], group["lr"] = configured["lr"], configured["lr"] * factor

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the random number generators for a batch, based on its position in the run."""
        if self._starts:  # in a resumed run, Lightning's logging step is off by one after its loop is reset
            set_logging_step(self.trainer, self.trainer.global_step)
            self._starts = False
        self._seed(self.trainer.fit_loop.epoch_loop.total_batch_idx, TRAIN_STREAM)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the contribution of a micro-batch to the mean loss over all labels of the optimizer step."""
        if self.expert_balancing is not None:
            self.expert_balancing.record()
        loss_sum, count = self.loss_and_count(batch)
        self._loss_sum = self._loss_sum + loss_sum.detach()
        for name, (weight, auxiliary) in self.auxiliary_losses.items():
            self._auxiliary_sums[name] = self._auxiliary_sums.get(name, 0.0) + auxiliary.detach()
            loss_sum = loss_sum + weight * auxiliary
        self.auxiliary_losses = {}
        layout, accumulate = self.data_info.layout, self.trainer.accumulate_grad_batches
        expected = staged_accumulation(self.trainer, layout.accumulate)
        if accumulate == expected and not STEP_KEYS.isdisjoint(batch):
            step_count = self.step_count(batch).to(loss_sum.dtype)
        else:  # a callback schedules the accumulation, or a custom data module does not count the labels of a step
            step_count = count.to(loss_sum.dtype) * (accumulate * layout.replicas)  # assumes equal micro-batches
        # Lightning divides the loss by the number of micro-batches per step, and DDP and FSDP average gradients over
        # the ranks. Dividing by the average number of labels per micro-batch therefore gives the gradient of the mean
        # loss over all labels of the step, however unevenly they are distributed.
        self._labels_per_rank = torch.where(step_count > 0, step_count, 1.0) / layout.replicas
        loss = loss_sum / (self._labels_per_rank / accumulate)
        return loss if self.expert_balancing is None else loss + self.expert_balancing.loss(find_tokens(batch))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Complete tensor-parallel gradients, log the loss, learning rate and gradient norm, and notify callbacks.

        Metrics are logged only if ``is_log_step`` is True, because reading their values synchronizes with the device.
        Lightning runs the callbacks' ``on_before_optimizer_step`` hooks before this one, when tensor-parallel gradients
        are still incomplete. Callbacks that require the complete gradients before clipping can define
        ``on_gradient(trainer, module)``, which this hook calls.
        """
        if self.device_mesh is not None:
            reduce_tp_gradients(self.net, self.device_mesh)
        if self.is_log_step or self.step_filter is not None:
            rank_mean = self.trainer.strategy.reduce(self._loss_sum.clone(), reduce_op="mean")  # it reduces in place
            self.step_loss = rank_mean / self._labels_per_rank
        if self.is_log_step and self.step_loss is not None:
            self.log("train/loss", self.step_loss)
            for name, auxiliary in self._auxiliary_sums.items():
                rank_mean = self.trainer.strategy.reduce(auxiliary, reduce_op="mean")
                self.log(f"train/{name}", rank_mean / self._labels_per_rank)
            first = optimizer.param_groups[0]
            self.log("train/learning_rate", first["lr"] / first.get("lr_scale", 1.0))  # the same at each width with mup
            self.log("train/gradient_norm", total_grad_norm(gradients_of(self)))
        if self.expert_balancing is not None:
            copies = self.trainer.world_size // self.data_info.layout.replicas  # processes with the same tokens
            self.expert_balancing.end_step(lambda load: self.trainer.strategy.reduce(load, reduce_op="sum") // copies)
            if self.is_log_step:
                self.log_dict({f"experts/{name}": value for name, value in self.expert_balancing.metrics().items()})
        self._loss_sum.zero_()
        self._auxiliary_sums.clear()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
            if (on_gradient := getattr(callback, "on_gradient", None)) is not None:
                on_gradient(self.trainer, self)

    @property
    def is_log_step(self) -> bool:
        """Whether the current optimizer step is logged: the first step, and every ``log_every_n_steps`` steps."""
        step = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
        return bool(every) and (step == 0 or (step + 1) % every == 0)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients as specified by the trainer's flags, and apply ``step_filter``.

        With every strategy, clipping by norm uses the total norm over all gradients. ``step_filter`` is called in this
        hook, because it is the last hook before the optimizer step.
        """
        gradients = gradients_of(self)
        by_norm = gradient_clip_val and gradient_clip_algorithm != "value"
        norm = total_grad_norm(gradients) if self.step_filter is not None and not by_norm else None
        if gradient_clip_val and by_norm:
            norm = clip_grad_norm(gradients, gradient_clip_val)
        elif gradient_clip_val:
            clip_grad_value(gradients, gradient_clip_val)
        has_filter = self.step_filter is not None and self.step_loss is not None and norm is not None
        if has_filter and not self.step_filter(self.step_loss, norm):  # type: ignore[misc, arg-type]  # none is None
            optimizer.zero_grad(set_to_none=True)  # optimizers skip parameters without a gradient
            self._rejects_step = True

    def _on_optimizer_step(self, *_: Any) -> None:
        """Update the biases of experts after an optimizer step that is neither rejected nor skipped by a scaler."""
        if self.expert_balancing is not None and not self._rejects_step:
            self.expert_balancing.update_biases()
        self._rejects_step = False

    def on_train_end(self) -> None:
        """Replace the weights with their moving averages, if averaging is enabled."""
        self._use_ema(True)

    # Validation and test.

    def on_validation_start(self) -> None:
        """Seed the random number generators based on the position in the run, and switch to the averaged weights.

        Because of the seed, a validation run that is repeated after resuming has the same results.
        """
        self._seed(self.trainer.fit_loop.epoch_loop.total_batch_idx, VALIDATION_STREAM)
        self._use_ema(True)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Add a batch to the metrics, and return the loss of each label as ``label_losses``, if available."""
        label_losses = self.update_metrics(batch)
        return None if label_losses is None else {"label_losses": label_losses}

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all validation data."""
        self.log_metrics("val")

    def on_validation_end(self) -> None:
        """Switch back to the current weights, once the ``on_validation_end`` hooks of all callbacks have run."""
        self._use_ema(False)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the metrics."""
        self.update_metrics(batch)

    def on_test_epoch_end(self) -> None:
        """Log the metrics over all test data."""
        self.log_metrics("test")

    def log_metrics(self, split: str) -> None:
        """Log the metrics as ``split/name`` and reset them."""
        for name, value in self.compute_metrics().items():
            self.log(f"{split}/{name}", value, sync_dist=True)
        self.metrics.reset()

    def _use_ema(self, active: bool) -> None:
        if self.trainer.state.fn == "fit":
            self.ema.set_active(active, self.trainer.optimizers, self)

    def _seed(self, batch: int, stream: int) -> None:
        rank = self.data_info.rank  # processes with the same data get the same random numbers
        key = (self._global_seed, batch + 1, rank, stream)
        torch_seed, python_seed, numpy_seed = np.random.SeedSequence(key).generate_state(3).tolist()
        if self.device.type == "cpu":  # torch.manual_seed formats a stack trace for each unavailable device type
            torch.default_generator.manual_seed(torch_seed)
        else:
            torch.manual_seed(torch_seed)
        random.seed(python_seed)
        np.random.seed(numpy_seed)  # noqa: NPY002 - users' code may use it

    # Checkpoints.

    def checkpoint_metadata(self) -> CheckpointMetadata:
        """Return the metadata that is required, in addition to the weights, to use a checkpoint outside of this run."""
        data, net = self.data_info, self.net
        return CheckpointMetadata(
            gpt=asdict(self.gpt),
            vocab_size=net.vocab_size,
            block_size=net.block_size,
            tokenizer=data.tokenizer_json,
            start_of_text=data.start_of_text if data.start_of_text != data.end_of_text else None,
            lora=None if self.lora is None else asdict(self.lora),
            base=self._base_hash,
            new_head=self._trains_new_head and self.lora is not None,
            published=data.published,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metadata, the batch layout and the load of experts; save averages of the weights, if there are any.

        A validation that is repeated after a kill draws the load of the last step.
        """
        checkpoint[METADATA_KEY] = asdict(self.checkpoint_metadata())
        checkpoint[BATCH_LAYOUT_KEY] = self.data_info.layout._asdict()
        if self.expert_balancing is not None:
            checkpoint[EXPERT_LOAD_KEY] = self.expert_balancing.load.tolist()
        self.ema.save(checkpoint, self.trainer.optimizers, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Normalize the saved progress counters and convert them to the current batch layout before they are restored.

        Raises:
            UserError: The training state is corrupted, or the checkpoint has a different model or tokenizer.
        """
        if "loops" in checkpoint:
            validate_training_state(checkpoint)
            progress = checkpoint["loops"]["fit_loop"]
            normalize_progress(progress)
            if BATCH_LAYOUT_KEY in checkpoint:
                rescale_batch_counts(progress, BatchLayout(**checkpoint[BATCH_LAYOUT_KEY]), self.data_info.layout)
        if self.trainer.state.fn == "fit":
            self.ema.load(checkpoint)
        saved, own = CheckpointMetadata.from_checkpoint(checkpoint), self.checkpoint_metadata()
        require_same_model(saved, own)
        self._base_hash = saved.base
        if self.expert_balancing is not None and EXPERT_LOAD_KEY in checkpoint:
            self.expert_balancing.load = torch.tensor(checkpoint[EXPERT_LOAD_KEY])
        require_same_tokenizer(saved, own.tokenizer)
