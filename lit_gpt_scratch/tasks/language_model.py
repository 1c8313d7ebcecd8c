"""Next-token prediction: pretraining, and whatever else learns from labelled tokens."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any, Protocol, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from lit_gpt_scratch.batch import IGNORED, Batch
from lit_gpt_scratch.checkpoint.contents import KEY, Contents, refuse_other_model, refuse_other_tokenizer
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.hardware.accounting import refuse_too_large
from lit_gpt_scratch.hardware.defaults import why_not_compile
from lit_gpt_scratch.hardware.parallel import parallelise, settle_gradients
from lit_gpt_scratch.hardware.strategies import ModelParallel as ModelParallel  # its module names them for trainers
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.attention import attention_class
from lit_gpt_scratch.model.layout import refuse_backend
from lit_gpt_scratch.objectives.likelihood import token_nats
from lit_gpt_scratch.objectives.metrics import LikelihoodMetric
from lit_gpt_scratch.optim import Muon, OptimizerRecipe, Schedule
from lit_gpt_scratch.optim.parts import gradients, own_part, total_norm
from lit_gpt_scratch.tasks.base import Task


class TokenData(Protocol):
    """What the task reads from the data module, once that is set up."""

    vocab_size: int
    block_size: int
    uneven: bool
    token_bytes: list[int]
    tokenizer_json: str


class LanguageModel(Task):
    """A GPT that learns to predict the next token.

    Arguments are only stored here. The network is built in ``configure_model``, when the trainer knows
    its hardware and the data module its vocabulary.

    Args:
        gpt: The architecture.
        optimizer: Which optimizer, with its learning rate.
        schedule: The learning rate over the run.
        ema_decay: Of a moving average of the weights, such as 0.999; see ``Task``.
        compile: Compile the network with ``torch.compile``; by default its blocks, wherever that can work. If it is
            asked for, head and loss as well, which takes longer to begin, and pays with a large vocabulary.
        activation_checkpointing: Keep each block's input alone for the backward pass, and compute the rest again: less
            memory for a third more computation.

    Raises:
        UserError: The architecture names attention of one's own that cannot be imported.
    """

    net: GPT
    token_bytes: Tensor

    def __init__(
        self,
        gpt: GPTConfig = GPTConfig(),  # noqa: B008 - frozen, so that it can be shared
        optimizer: OptimizerRecipe = Muon(),  # noqa: B008 - an instance, so that --model.optimizer.lr works
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        ema_decay: float | None = None,
        compile: bool | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(ema_decay)
        attention_class(gpt.attention)
        self.gpt = gpt
        self.optimizer = optimizer
        self.schedule = schedule
        self.compile_network = compile
        self.activation_checkpointing = activation_checkpointing
        self.likelihood = LikelihoodMetric()
        self.total_steps = float("inf")

    @property
    def data(self) -> TokenData:
        """The data module.

        Raises:
            UserError: The trainer was given bare loaders, which do not know their vocabulary.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise UserError("LanguageModel learns its vocabulary from a data module: trainer.fit(model, datamodule)")
        return cast(TokenData, data)

    def configure_model(self) -> None:
        """Build the network for the data's vocabulary and window; a second call changes nothing.

        Raises:
            UserError: No machine like this can hold it, or its attention cannot be trained on this device.
        """
        if hasattr(self, "net"):
            return
        sizes = self.gpt, self.data.vocab_size, self.data.block_size
        refuse_backend(self.gpt, self.trainer.strategy.root_device)
        refuse_too_large(*sizes, self.trainer.strategy.root_device, self.trainer.world_size)
        self.net = GPT(*sizes)
        self.net.recompute = self.activation_checkpointing
        if self.device_mesh is not None:
            parallelise(self.net, self.device_mesh, str(self.trainer.precision))
        self.register_buffer("token_bytes", torch.tensor(self.data.token_bytes), persistent=False)

    def on_fit_start(self) -> None:
        """Compile the blocks in place, so that names in checkpoints stay the same.

        Blocks alike share one compilation, so that a deep network compiles no longer than a shallow one.

        Raises:
            UserError: It was asked for and cannot work here.
        """
        why_not = why_not_compile(self.device, asked=self.compile_network is True)
        if self.compile_network and why_not:
            raise UserError(f"model.compile: {why_not}")
        if why_not is None and self.compile_network is not False:
            for block in self.net.blocks:
                block.compile()

    @property
    def compiled(self) -> bool:
        """Whether the network runs compiled."""
        return any(block._compiled_call_impl is not None for block in self.net.blocks)

    def on_train_start(self) -> None:
        """Learn how long the run is.

        Not earlier: asking for it loads the training data, and that has to wait until a resumed trainer
        knows where it stands.
        """
        super().on_train_start()
        self.total_steps = self.trainer.estimated_stepping_batches
        self._use_own_hyperparameters()
        self._nats = torch.zeros((), device=self.device)
        self._tokens = torch.zeros((), device=self.device, dtype=torch.int64)
        self._micro_batches = 0

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The recipe's optimizer, with the schedule stepped after every update."""
        optimizer = self.optimizer.build(self.net)
        self.average.follow(optimizer, lambda: self.trainer.global_step)
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _use_own_hyperparameters(self) -> None:
        """What the flags say of the optimizer, not what a checkpoint says; only its memory of gradients stays."""
        fresh = self.optimizer.build(self.net)
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        scheduler.base_lrs = [group["lr"] for group in fresh.param_groups]
        factor = self.schedule.factor(self.trainer.global_step, self.total_steps)
        for group, own in zip(self.trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
            group["initial_lr"], group["lr"] = own["lr"], own["lr"] * factor

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits of the next token: (B, T) int64 -> (B, T, vocab_size) float32; see ``GPT.forward``."""
        logits: Tensor = self.net(input_ids, document_ids)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of the batch's labels, in nats per position; all of them have one, but where windows are filled up."""
        nats, tokens = self._token_nats(batch)
        self._nats = self._nats + nats.detach()
        self._tokens += tokens
        self._micro_batches += 1
        self._positions = batch["labels"].numel()
        return nats / self._positions

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Weigh the gradient, and log the step's loss at log points alone: reading it costs a sync."""
        if self.device_mesh is not None:
            settle_gradients(self.net, self.device_mesh)
        if self.data.uneven or self._micro_batches != self.trainer.accumulate_grad_batches:
            self._weigh_gradient()
        step = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
        if every and (step == 0 or (step + 1) % every == 0):
            sums = torch.stack((self._nats, self._tokens.to(self._nats.dtype)))
            nats, tokens = self.trainer.strategy.reduce(sums, reduce_op="sum")
            self.log("train/loss", nats / tokens)
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
            self.log("train/gradient_norm", total_norm(gradients(self)))
        self._nats.zero_()
        self._tokens.zero_()
        self._micro_batches = 0

    def _weigh_gradient(self) -> None:
        """Make it that of the mean over the step's labels, with whichever micro-batch and on whichever rank they came.

        It is their sum, by the positions of ``accumulate_grad_batches`` micro-batches on each rank. There are fewer
        labels where windows are filled up, and fewer micro-batches where an epoch ends.
        """
        labels = self.trainer.strategy.reduce(self._tokens.float(), reduce_op="sum").clamp(min=1)
        counted = self._positions * self.trainer.accumulate_grad_batches * self.trainer.world_size
        torch._foreach_mul_([own_part(gradient) for gradient in gradients(self)], counted / labels)

    def _token_nats(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As the function; head and loss can be one program, which saves writing the logits back and forth."""
        given = batch["input_ids"], batch.get("document_ids")
        if self.device_mesh is not None or not (self.compiled and self.compile_network):
            return token_nats(self(*given), batch["labels"])
        return _compiled_nats()(self.net, self.net.hidden(*given), batch["labels"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the likelihood."""
        labels = batch["labels"]
        nats, tokens = self._token_nats(batch)
        self.likelihood.update(nats, tokens, self.token_bytes[labels[labels != IGNORED]].sum())

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte of the whole validation text."""
        for name, value in self.likelihood.compute().items():
            self.log(f"val/{name}", value, sync_dist=True)
        self.likelihood.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what is needed to use the weights without this run: shape and tokenizer, as plain data."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY] = asdict(
            Contents(asdict(self.gpt), self.data.vocab_size, self.data.block_size, self.data.tokenizer_json)
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another shape or another tokenizer, by name."""
        super().on_load_checkpoint(checkpoint)
        contents = Contents.of(checkpoint)
        refuse_other_model(contents, asdict(self.gpt), self.data.vocab_size, self.data.block_size)
        refuse_other_tokenizer(contents, self.data.tokenizer_json)


def _nats(net: GPT, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return token_nats(net.read(x), labels)


@cache
def _compiled_nats() -> Callable[[GPT, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Made when it is needed: the compiler takes seconds to import. No method, which a copy of a task would share."""
    return torch.compile(_nats)
