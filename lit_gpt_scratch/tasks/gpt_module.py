"""What every task does so that a run that was killed goes on as if it had not been."""

import logging
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer
from torchmetrics import Metric, MetricCollection

from lit_gpt_scratch.batch_types import BatchLayout
from lit_gpt_scratch.checkpoint.adapters import hash_base_weights
from lit_gpt_scratch.checkpoint.init_from import (
    copy_weights,
    let_go,
    load_initial_metadata,
    load_initial_model,
    resolve_context,
)
from lit_gpt_scratch.checkpoint.loop_state import BATCH_LAYOUT_KEY, normalize_progress, rescale_batch_counts
from lit_gpt_scratch.checkpoint.metadata import (
    METADATA_KEY,
    CheckpointMetadata,
    require_same_model,
    require_same_tokenizer,
)
from lit_gpt_scratch.distributed.hardware_defaults import explain_no_compile
from lit_gpt_scratch.distributed.parallelize import parallelize, reduce_tp_gradients
from lit_gpt_scratch.distributed.strategies import ModelParallel as ModelParallel  # its module names them for trainers
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.lightning_compat import set_logging_step
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.attention import resolve_attention_class, validate_attention_backend
from lit_gpt_scratch.model.lora import LoRA, add_lora
from lit_gpt_scratch.model.output_heads import OutputHead, TokenHead
from lit_gpt_scratch.optim import Muon, OptimizerRecipe, Schedule
from lit_gpt_scratch.optim.dtensor import to_local
from lit_gpt_scratch.optim.ema import ExponentialMovingAverage
from lit_gpt_scratch.optim.gradient_clipping import clip_grad_norm, clip_grad_value, gradients_of, total_grad_norm
from lit_gpt_scratch.profiling.flops_and_memory import require_model_fits_memory


class StepFilter(Protocol):
    """Who says whether a step that is computed is done."""

    def __call__(self, loss: Tensor | None, norm: Tensor) -> bool:
        """Asked on every rank, with the same numbers, when the gradient has been clipped.

        Args:
            loss: Of the step, a scalar; None of a task that does not know it.
            norm: Of its gradient before it was clipped, a scalar.
        """


log = logging.getLogger(__name__)


class AnyTokenizer(Protocol):
    """What a task reads from the data's tokenizer."""

    start_of_text: int
    end_of_text: int


class TokenData(Protocol):
    """What a task reads from the data module, once that is set up."""

    vocab_size: int
    block_size: int
    uneven: bool
    token_bytes: list[int]
    tokenizer: AnyTokenizer
    tokenizer_json: str


class GPTModule(L.LightningModule):
    """A GPT and its training objective.

    Subclasses compute the loss (``loss_and_count``) and choose the output head (``output_head``). Arguments are only
    stored here. The network is built in ``configure_model``, when the trainer knows its hardware and the data module
    its vocabulary.

    Args:
        gpt: The architecture; by default that of ``init_from``, or a small one.
        optimizer: Which optimizer, with its learning rate.
        schedule: The learning rate over the run.
        init_from: A trained model to begin with: a run folder, a checkpoint, a ``.safetensors`` file, or a folder of
            Hugging Face's.
        lora: Train low-rank adapters beside its weights, and a new head, instead of all; see ``model.lora``.
        train_layers: Train the last so many blocks, the norm and the head behind them, and keep the rest as it is; a
            trained head that shares the embedding's matrix, too.
        ema_decay: Of a moving average of the weights, such as 0.999; see ``GPTModule``.
        compile: ``blocks``, the default, compiles the network's blocks with ``torch.compile`` wherever that works.
            ``true`` also compiles what else of a step can be compiled, which takes longer to start, and is an error
            where compiling does not work. ``false`` compiles nothing.
        activation_checkpointing: Keep each block's input alone for the backward pass, and compute the rest again: less
            memory for a third more computation.

    Raises:
        UserError: The architecture names attention of one's own that cannot be imported, or arguments contradict each
            other.
    """

    net: GPT
    metrics: Metric | MetricCollection
    """What validation and test measure."""
    allows_dropout: ClassVar[bool] = True
    """Whether there is dropout in training. A stage whose loss compares probabilities with those of before has none:
    what is dropped would look like what is learned. The start's is switched off, one that is asked for refused."""

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
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.schedule = schedule
        self.total_steps = float("inf")
        """Optimizer steps of the run, infinite as long as that is not known."""
        self.ema = ExponentialMovingAverage(ema_decay)
        self.step_filter: StepFilter | None = None
        """Without one every step is done. A step that is refused counts, but changes neither weights nor averages nor
        what the optimizer remembers."""
        self.step_loss: Tensor | None = None
        """Of the step whose gradient is at hand, over all ranks, where a step filter asks for it."""
        if lora is not None and train_layers is not None:
            raise UserError("model.lora and model.train_layers both say what is trained; give one of them")
        if train_layers is not None and train_layers < 0:
            raise UserError(f"model.train_layers is {train_layers}; it must be 0 or more")
        asked = {"gpt": gpt and gpt.dropout, "lora": lora and lora.dropout}
        for part, share in asked.items():
            if share and not self.allows_dropout:
                raise UserError(
                    f"model.{part}.dropout is {share}, but {type(self).__name__} compares probabilities with those of "
                    "before, and drops nothing: leave it out"
                )
        if gpt is not None:
            resolve_attention_class(gpt.attention)
        self._gpt = gpt
        self.init_from = init_from
        self.lora = lora
        self.train_layers = train_layers
        self.compile_network = compile
        self.activation_checkpointing = activation_checkpointing
        self.head_is_new = False
        """Whether the head of what it begins with reads something else, so that its own is drawn anew."""
        self._base: str | None = None

    @property
    def output_head(self) -> OutputHead:
        """What the head reads off the stream."""
        return TokenHead()

    @property
    def data(self) -> TokenData:
        """The data module.

        Raises:
            UserError: The trainer was given bare loaders, which do not know their vocabulary.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise UserError(
                f"{type(self).__name__} learns its vocabulary from a data module: trainer.fit(model, datamodule)"
            )
        return cast(TokenData, data)

    @cached_property
    def gpt(self) -> GPTConfig:
        """The architecture."""
        if self._gpt is not None:
            return self._gpt
        found = GPTConfig() if self.init_from is None else GPTConfig(**load_initial_metadata(self.init_from).gpt)
        return found if self.allows_dropout else replace(found, dropout=0.0)

    def configure_model(self) -> None:
        """Build the network for the data's vocabulary and window; a second call changes nothing.

        Raises:
            UserError: No machine like this can hold it, its attention cannot be trained on this device, or it does not
                fit the model that it is to begin with.
        """
        if hasattr(self, "net"):
            return
        device, vocab_size, block_size = self.trainer.strategy.root_device, self.data.vocab_size, self.data.block_size
        trained = None if self.init_from is None else load_initial_model(self.init_from, self.gpt.attention)
        if trained is not None:
            require_same_tokenizer(trained.metadata, self.data.tokenizer_json)
            vocab_size, block_size = trained.net.vocab_size, resolve_context(trained, self.gpt, block_size)
        validate_attention_backend(self.gpt, device)
        require_model_fits_memory(self.gpt, vocab_size, block_size, device, self.trainer.world_size)
        self.net = GPT(self.gpt, vocab_size, block_size, self.output_head)
        # A run that goes on begins with its own checkpoint: what was new to it still is.
        kept = trained is not None and copy_weights(trained, self.net)
        self.head_is_new = trained is not None and not kept
        self._new_head = trained is None or self.head_is_new or trained.metadata.new_head
        if trained is None and (self.lora or self.train_layers is not None):
            log.warning("without model.init_from, what is not trained stays as it was drawn; name a trained model")
        if trained is not None:
            self._base = hash_base_weights(self.net, self._new_head) if self.lora else None
            let_go()
        self._freeze()
        beside = self.build_auxiliary_networks()
        self.net.recompute = self.activation_checkpointing
        if self.device_mesh is not None:
            for net in (self.net, *beside):
                parallelize(net, self.device_mesh, str(self.trainer.precision))
        self.metrics = self.build_metrics()

    def build_auxiliary_networks(self) -> Sequence[GPT]:
        """Build what a stage needs beside its network, which is as it begins; networks among it, to be dealt out."""
        return ()

    def _freeze(self) -> None:
        """Leave to be trained what the arguments say; a head that nobody has trained yet always is.

        Raises:
            UserError: An adapter would change the embedding by way of the head that shares its matrix.
        """
        tied = self.net.head.weight is self.net.embedding.weight
        if self.lora is not None:
            names = add_lora(self.net, self.lora)
            if tied and "head" in names:
                raise UserError(
                    f"model.lora.pattern is {self.lora.pattern}, which matches the head, but its matrix is the "
                    f"embedding's: leave it out, as in (^|\\.)blocks\\."
                )
            if self._new_head:
                self.net.head.requires_grad_(True)
        elif self.train_layers is not None:
            self.net.requires_grad_(False)
            trained = self.net.blocks[max(0, len(self.net.blocks) - self.train_layers) :]
            for module in (*trained, self.net.norm, *([] if tied and not self._new_head else [self.net.head])):
                module.requires_grad_(True)

    @property
    def trains_only_adapters(self) -> bool:
        """Whether nothing but adapters is trained, so that the network without them is as it began."""
        return self.lora is not None and not self._new_head

    def on_fit_start(self) -> None:
        """Compile the blocks in place, so that names in checkpoints stay the same.

        Blocks alike share one compilation, so that a deep network compiles no longer than a shallow one.

        Raises:
            UserError: It was asked for and cannot work here.
        """
        why_not = explain_no_compile(self.device, requested=self.compile_network is True)
        if self.compile_network is True and why_not:
            raise UserError(f"model.compile: {why_not}")
        if why_not is None and self.compile_network is not False:
            for block in self.net.blocks:
                block.compile()

    @property
    def compiled(self) -> bool:
        """Whether the network runs compiled."""
        return any(block._compiled_call_impl is not None for block in self.net.blocks)

    def checkpoint_metadata(self) -> CheckpointMetadata:
        """What a checkpoint says of its weights, so that they can be used without this run."""
        tokenizer = self.data.tokenizer
        own_start = tokenizer.start_of_text if tokenizer.start_of_text != tokenizer.end_of_text else None
        lora = None if self.lora is None else asdict(self.lora)
        sizes = self.net.vocab_size, self.net.block_size
        head = self._new_head and lora is not None
        return CheckpointMetadata(asdict(self.gpt), *sizes, self.data.tokenizer_json, own_start, lora, self._base, head)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store them with the weights, as plain data."""
        if self.layout is not None:
            checkpoint[BATCH_LAYOUT_KEY] = self.layout._asdict()
        self.ema.save(checkpoint, self.trainer.optimizers, self)
        checkpoint[METADATA_KEY] = asdict(self.checkpoint_metadata())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another shape or another tokenizer, by name."""
        if "loops" in checkpoint:
            normalize_progress(checkpoint["loops"]["fit_loop"])
            if self.layout is not None and BATCH_LAYOUT_KEY in checkpoint:
                rescale_batch_counts(
                    checkpoint["loops"]["fit_loop"], BatchLayout(**checkpoint[BATCH_LAYOUT_KEY]), self.layout
                )
        if self.trainer.state.fn == "fit":
            self.ema.load(checkpoint)
        there, here = CheckpointMetadata.from_checkpoint(checkpoint), self.checkpoint_metadata()
        require_same_model(there, here)
        self._base = there.base
        require_same_tokenizer(there, here.tokenizer)

    def loss_and_count(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The summed loss of a batch, and over how many labels it is summed, or how much they weigh: two scalars."""
        raise NotImplementedError

    def positions(self, batch: Any) -> int:
        """How many labels there could be: as many in every micro-batch of a step, and on every rank."""
        return int(batch["labels"].numel())

    def split_batch(self, batch: Any) -> list[Any]:
        """What the data module dealt out in a batch, each as a batch of its own; nothing of what it does not have."""
        n = len(batch["labels"])
        return [{name: rows[place : place + 1] for name, rows in batch.items()} for place in range(n)]

    @property
    def trained_module(self) -> nn.Module:
        """What the optimizer updates."""
        return self.net

    @property
    def is_log_step(self) -> bool:
        """Whether the step that is being made is logged."""
        step = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
        return bool(every) and (step == 0 or (step + 1) % every == 0)

    def build_metrics(self) -> Metric | MetricCollection:
        """What validation and test measure; its ``compute`` gives figures by name."""
        raise NotImplementedError

    def update_metrics(self, batch: Any) -> Tensor | None:
        """Add a batch to ``metrics``.

        Returns:
            What was lost at each label, which callbacks get as the outputs of a validation step: (B, T), or (B,) where
            a row has one label; 0 where there is none. None of a loss that is of no label.
        """
        raise NotImplementedError

    @property
    def uneven(self) -> bool:
        """Whether some batches of the training have fewer labels than others."""
        return bool(self.trainer.datamodule.uneven)  # type: ignore[attr-defined]  # the trainer sets it late

    def on_train_start(self) -> None:
        """Learn how long the run is.

        Not earlier: asking for it loads the training data, and that has to wait until a resumed trainer
        knows where it stands.
        """
        self._use_average(False)  # in a checkpoint the average was in the weights' place
        self.total_steps = self.trainer.estimated_stepping_batches
        self._use_own_hyperparameters()
        self._lost = torch.zeros((), device=self.device)
        self._counted = torch.zeros((), device=self.device, dtype=torch.int64)
        self._micro_batches = 0

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The recipe's optimizer, with the schedule stepped after every update."""
        optimizer = self.optimizer.build(self.trained_module)
        self.ema.attach(optimizer, lambda: self.trainer.global_step)
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _use_own_hyperparameters(self) -> None:
        """What the flags say of the optimizer, not what a checkpoint says; only its memory of gradients stays."""
        fresh = self.optimizer.build(self.trained_module)
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        scheduler.base_lrs = [group["lr"] for group in fresh.param_groups]
        factor = self.schedule.factor(self.trainer.global_step, self.total_steps)
        for group, own in zip(self.trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
            group["initial_lr"], group["lr"] = own["lr"], own["lr"] * factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The summed loss by the positions that could have a label; all have one, but where batches are filled up."""
        lost, counted = self.loss_and_count(batch)
        self._lost = self._lost + lost.detach()
        self._counted = self._counted + counted
        self._micro_batches += 1
        self._positions = self.positions(batch)
        loss: Tensor = lost / self._positions
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Weigh the gradient, show it, and log the step's loss at log points alone: reading it costs a sync.

        Callbacks see the gradient before this. Those that have a method ``on_gradient(trainer, task)`` see it here, as
        that of the mean over the step's labels, and not clipped yet.
        """
        if self.device_mesh is not None:
            reduce_tp_gradients(self.net, self.device_mesh)
        if self.uneven or self._micro_batches != self.trainer.accumulate_grad_batches:
            self._weigh_gradient()
        if self.is_log_step or self.step_filter is not None:
            sums = torch.stack((self._lost, self._counted.to(self._lost.dtype)))
            lost, counted = self.trainer.strategy.reduce(sums, reduce_op="sum")
            self.step_loss = lost / torch.where(counted > 0, counted, 1.0)
        if self.is_log_step and self.step_loss is not None:
            self.log("train/loss", self.step_loss)
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
            self.log("train/gradient_norm", total_grad_norm(gradients_of(self)))
        self._lost.zero_()
        self._counted.zero_()
        self._micro_batches = 0
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
            if (shown := getattr(callback, "on_gradient", None)) is not None:
                shown(self.trainer, self)

    def _weigh_gradient(self) -> None:
        """Make it that of the mean over the step's labels, with whichever micro-batch and on whichever rank they came.

        It is their sum, by the positions of ``accumulate_grad_batches`` micro-batches on each rank. There are fewer
        labels where batches are filled up, and fewer micro-batches where an epoch ends.
        """
        own = self._counted.to(torch.float32, copy=True)  # what is given is summed in place
        labels = self.trainer.strategy.reduce(own, reduce_op="sum")
        positions = self._positions * self.trainer.accumulate_grad_batches * self.trainer.world_size
        torch._foreach_mul_(
            [to_local(gradient) for gradient in gradients_of(self)], positions / torch.where(labels > 0, labels, 1.0)
        )

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Measure the batch."""
        lost = self.update_metrics(batch)
        return None if lost is None else {"token_losses": lost}

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure the batch."""
        self.update_metrics(batch)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured of all that is validated on."""
        self.log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log what was measured of all that is tested on."""
        self.log_metrics("test")

    def compute_metrics(self) -> dict[str, Tensor]:
        """What was measured, by name: scalars."""
        found: dict[str, Tensor] = self.metrics.compute()
        return found

    def log_metrics(self, side: str) -> None:
        """Log the figures as ``side/name``, and begin anew."""
        for name, value in self.compute_metrics().items():
            self.log(f"{side}/{name}", value, sync_dist=True)
        self.metrics.reset()

    @property
    def layout(self) -> BatchLayout | None:
        """How the data module deals out a step; None if it does not say."""
        return getattr(getattr(self.trainer, "datamodule", None), "layout", None)

    def setup(self, stage: str) -> None:
        """Begin with the weights as they are, whatever an earlier run left in them."""
        if stage == "fit":
            self.ema.active = False

    def on_train_end(self) -> None:
        """Leave the average in the weights' place."""
        self._use_average(True)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer's flags say, under every strategy: the norm is that of the whole gradient.

        This is the last moment before the step, and so the judge's.
        """
        found = gradients_of(self)
        by_norm = gradient_clip_val and gradient_clip_algorithm != "value"
        norm = total_grad_norm(found) if self.step_filter is not None and not by_norm else None
        if gradient_clip_val and by_norm:
            norm = clip_grad_norm(found, gradient_clip_val)
        elif gradient_clip_val:
            clip_grad_value(found, gradient_clip_val)
        if self.step_filter is not None and norm is not None and not self.step_filter(self.step_loss, norm):
            optimizer.zero_grad(set_to_none=True)  # what has no gradient, no optimizer touches

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw this batch's random numbers from its place in the run."""
        set_logging_step(self.trainer, self.trainer.global_step)
        self._seed(self.trainer.fit_loop.epoch_loop.total_batch_idx, "train")

    def on_validation_start(self) -> None:
        """The same for a validation, so that one that is done again after a kill gives the same."""
        self._seed(self.trainer.fit_loop.epoch_loop.total_batch_idx, "validation")
        self._use_average(True)

    def on_validation_end(self) -> None:
        """Go on with the weights themselves; callbacks have had their turn."""
        self._use_average(False)

    def _use_average(self, wanted: bool) -> None:
        if self.trainer.state.fn == "fit":
            self.ema.set_active(wanted, self.trainer.optimizers, self)

    def _seed(self, batch: int, purpose: str) -> None:
        run = int(os.environ.get("PL_GLOBAL_SEED", 0))
        shard = self.trainer.distributed_sampler_kwargs or {"rank": 0}  # ranks that share their data draw alike
        key = (run, batch + 1, shard["rank"], len(purpose))
        drawn = np.random.SeedSequence(key).generate_state(3)
        if self.device.type == "cpu":  # the other formats a stack trace for each kind of device that is not there
            torch.default_generator.manual_seed(int(drawn[0]))
        else:
            torch.manual_seed(int(drawn[0]))
        random.seed(int(drawn[1]))
        np.random.seed(int(drawn[2]))  # noqa: NPY002 - what a user's own part may draw from
