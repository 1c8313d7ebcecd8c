"""What every stage does with its GPT: build it or begin with a trained one, compile it, step it, and save it."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, cast

from lit_gpt_scratch.checkpoint.adapters import fingerprint
from lit_gpt_scratch.checkpoint.contents import KEY, Contents, refuse_other_model, refuse_other_tokenizer
from lit_gpt_scratch.checkpoint.starting import begin_with, context, let_go, start, start_contents
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.hardware.accounting import refuse_too_large
from lit_gpt_scratch.hardware.defaults import why_not_compile
from lit_gpt_scratch.hardware.parallel import parallelise
from lit_gpt_scratch.hardware.strategies import ModelParallel as ModelParallel  # its module names them for trainers
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.attention import attention_class
from lit_gpt_scratch.model.heads import Head, Tokens
from lit_gpt_scratch.model.layout import refuse_backend
from lit_gpt_scratch.model.lora import LoRA, add_lora
from lit_gpt_scratch.optim import Muon, OptimizerRecipe, Schedule
from lit_gpt_scratch.tasks.stage import Stage

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


class GPTTask(Stage):
    """A stage of the lineage: a GPT, and something that it learns.

    Subclasses say what is lost on a batch (``losses``), and what their head reads (``reads``). Arguments are only
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
        ema_decay: Of a moving average of the weights, such as 0.999; see ``Task``.
        compile: Compile the network with ``torch.compile``; by default its blocks, wherever that can work. If it is
            asked for, what else of a step can be compiled as well, which takes longer to begin.
        activation_checkpointing: Keep each block's input alone for the backward pass, and compute the rest again: less
            memory for a third more computation.

    Raises:
        UserError: The architecture names attention of one's own that cannot be imported, or arguments contradict each
            other.
    """

    drops: ClassVar[bool] = True
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
        compile: bool | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, ema_decay)
        if lora is not None and train_layers is not None:
            raise UserError("model.lora and model.train_layers both say what is trained; give one of them")
        if train_layers is not None and train_layers < 0:
            raise UserError(f"model.train_layers is {train_layers}; it must be 0 or more")
        asked = {"gpt": gpt and gpt.dropout, "lora": lora and lora.dropout}
        for part, share in asked.items():
            if share and not self.drops:
                raise UserError(
                    f"model.{part}.dropout is {share}, but {type(self).__name__} compares probabilities with those of "
                    "before, and drops nothing: leave it out"
                )
        if gpt is not None:
            attention_class(gpt.attention)
        self._gpt = gpt
        self.init_from = init_from
        self.lora = lora
        self.train_layers = train_layers
        self.compile_network = compile
        self.activation_checkpointing = activation_checkpointing
        self.forgets_head = False
        """Whether the head of what it begins with reads something else, so that its own is drawn anew."""
        self._base: str | None = None

    @property
    def reads(self) -> Head:
        """What the head reads off the stream."""
        return Tokens()

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
        found = GPTConfig() if self.init_from is None else GPTConfig(**start_contents(self.init_from).gpt)
        return found if self.drops else replace(found, dropout=0.0)

    def configure_model(self) -> None:
        """Build the network for the data's vocabulary and window; a second call changes nothing.

        Raises:
            UserError: No machine like this can hold it, its attention cannot be trained on this device, or it does not
                fit the model that it is to begin with.
        """
        if hasattr(self, "net"):
            return
        device, vocab_size, block_size = self.trainer.strategy.root_device, self.data.vocab_size, self.data.block_size
        trained = None if self.init_from is None else start(self.init_from, self.gpt.attention)
        if trained is not None:
            refuse_other_tokenizer(trained.contents, self.data.tokenizer_json)
            vocab_size, block_size = trained.net.vocab_size, context(trained, self.gpt, block_size)
        refuse_backend(self.gpt, device)
        refuse_too_large(self.gpt, vocab_size, block_size, device, self.trainer.world_size)
        self.net = GPT(self.gpt, vocab_size, block_size, self.reads)
        # A run that goes on begins with its own checkpoint: what was new to it still is.
        kept = trained is not None and begin_with(trained, self.net)
        self.forgets_head = trained is not None and not kept
        self._new_head = trained is None or self.forgets_head or trained.contents.new_head
        if trained is None and (self.lora or self.train_layers is not None):
            log.warning("without model.init_from, what is not trained stays as it was drawn; name a trained model")
        if trained is not None:
            self._base = fingerprint(self.net, self._new_head) if self.lora else None
            let_go()
        self._freeze()
        beside = self.build_beside()
        self.net.recompute = self.activation_checkpointing
        if self.device_mesh is not None:
            for net in (self.net, *beside):
                parallelise(net, self.device_mesh, str(self.trainer.precision))
        self.metrics = self.build_metrics()

    def build_beside(self) -> Sequence[GPT]:
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
    def only_adapters(self) -> bool:
        """Whether nothing but adapters is trained, so that the network without them is as it began."""
        return self.lora is not None and not self._new_head

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

    def contents(self) -> Contents:
        """What a checkpoint says of its weights, so that they can be used without this run."""
        tokenizer = self.data.tokenizer
        own_start = tokenizer.start_of_text if tokenizer.start_of_text != tokenizer.end_of_text else None
        lora = None if self.lora is None else asdict(self.lora)
        sizes = self.net.vocab_size, self.net.block_size
        head = self._new_head and lora is not None
        return Contents(asdict(self.gpt), *sizes, self.data.tokenizer_json, own_start, lora, self._base, head)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store them with the weights, as plain data."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY] = asdict(self.contents())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another shape or another tokenizer, by name."""
        super().on_load_checkpoint(checkpoint)
        there, here = Contents.of(checkpoint), self.contents()
        refuse_other_model(there, here)
        self._base = there.base
        refuse_other_tokenizer(there, here.tokenizer)
