"""The tables of a config, one frozen dataclass each, and `Config` of them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ping_llm.config.bounds import RESUMABLE, Amount, Bounds, Count, Section, Share, Whole
from ping_llm.config.model import ModelConfig

FP8_MULTIPLE = 16  # of each side of a product in FP8
FP8_LEAST_WIDTH = 128  # as in nanochat: rounding is a pass over each factor, and small products leave little to win


@dataclass(frozen=True)
class DataConfig(Section):
    rows: Path = field(default=Path("data/rows"), metadata=RESUMABLE)
    """Folder of probe rows, as written by `ping-llm prepare`."""
    src_prefix_dropout: Share = 0.5
    """Share of windows whose source is cut to a prefix of 0 bytes to all but one."""
    dst_prefix_dropout: Share = 0.1
    """Share of measurements whose destination is cut to a prefix of 1 byte to all but one."""
    full_time: Share = 0.4
    """Share of windows in time order with every timestamp."""
    partial_time: Share = 0.3
    """Share of windows where 10–90 % of the measurements lose their timestamp; the rest of the windows have none."""
    canonical_order: Share = 0.0
    """Share of windows whose measurements all go source, destination, time, result; in the others each goes as it likes."""
    pseudonyms: Share = 0.0
    """Share of windows that give sources, destinations or both pseudonyms, which share prefixes as the addresses do."""
    shifted_pairs: Share = 0.0
    """Share of windows in which the RTTs of some pairs are longer or shorter by a factor, in canonical order."""
    mesh: Share = 0.0
    """Share of windows of several probes: measurements of one, and of up to 12 others to the same destinations."""
    synthetic: Share = 0.0
    """Share of windows from small synthetic Internets, each with addresses of its own."""
    short_windows: Whole = 0
    """Windows of data.short_len tokens beside each window of a batch, of the same row: more of what is learned is to answer
    with little context or none."""
    short_len: Annotated[int, Bounds(46)] = 48  # as of seq_len: a window has a token more
    """Tokens that a short window shows the model: of IPv4 two or three measurements, of IPv6 one."""
    replay: str = field(default="", metadata=RESUMABLE)
    """Folder of probe rows that windows are mixed in from, so that a run on other rows forgets them less. Empty = none."""
    replay_share: Share = 0.0
    """Share of the windows of each batch that are of data.replay."""
    windows_per_read: Count = 16
    """Windows that a large probe row gives once it is read, in steps that are not neighbours."""
    workers: Whole = field(default=0, metadata=RESUMABLE)
    """Loader processes; 0 loads in a thread of the training process. Does not change the batches."""
    prefetch: Count = field(default=2, metadata=RESUMABLE)
    """Blocks of batches made ahead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (total := self.full_time + self.partial_time) > 1:
            raise ValueError(f"data.full_time + data.partial_time = {total} must not exceed 1")
        if (total := self.mesh + self.synthetic) > 1:
            raise ValueError(f"data.mesh + data.synthetic = {total} must not exceed 1")
        if bool(self.replay) != bool(self.replay_share):
            raise ValueError(
                f"data.replay={self.replay!r} and data.replay_share={self.replay_share} go together: name rows, and a share "
                "above 0 of the windows"
            )

    def replayed(self, batch_size: int) -> int:
        """How many windows of a batch are of data.replay; ValueError if its share rounds to none or to all of them."""
        count = round(self.replay_share * batch_size)
        if self.replay and not 0 < count < batch_size:
            raise ValueError(
                f"data.replay_share={self.replay_share} of train.batch_size={batch_size} is {count} windows; let it be at "
                "least one, and not all"
            )
        return count


@dataclass(frozen=True)
class OptimConfig(Section):
    matrices: Literal["muon", "adamw"] = "muon"
    """Optimiser of the block matrices; all else is AdamW's."""
    muon_lr: Amount = 0.02
    """Muon rate of the block matrices; fits every width."""
    orthogonalization: Literal["newton-schulz", "polar-express"] = "newton-schulz"
    """Polynomials of Muon's five iterations: the same each time (Newton–Schulz), or each the best after those before it
    (Polar Express), which end nearer to an orthogonal matrix."""
    equal_rows: bool = False
    """Scale the rows of Muon's momentum to one length before it is made orthogonal (MuonEq)."""
    adamw_lr: Amount = 0.0015
    """AdamW rate of the block matrices, before width scaling, if they are AdamW's."""
    lora_rank: Whole = 0
    """Rank of the changes to the block matrices that are learned in place of the matrices (LoRA), by AdamW. Beside them
    only the table of address prefixes learns. Of runs with train.init_from; 0 = everything learns."""
    embedding_lr: Amount = 0.2
    """AdamW rate of the token embedding, before width scaling."""
    head_lr: Amount = 0.004
    """AdamW rate of the output head, before width scaling."""
    adam_beta1: Share = 0.8
    """AdamW first-moment decay."""
    adam_beta2: Share = 0.95
    """AdamW second-moment decay."""
    adam_eps: Amount = 1e-10
    """AdamW denominator offset."""
    momentum_start: Share = 0.85
    """Muon Nesterov momentum at step 0."""
    momentum_end: Share = 0.95
    """Muon Nesterov momentum after momentum_warmup_steps."""
    momentum_warmup_steps: Whole = 300
    """Steps over which the momentum rises."""
    weight_decay: Amount = 0.1
    """Decoupled weight decay of the block matrices at step 0, times their rate; nothing else decays."""
    weight_decay_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Over the run the decay falls to 0 in a line, falls to 0 as half a cosine, or stays."""
    schedule: Literal["wsd", "cosine", "linear"] = "wsd"
    """The rates after the rise: a plateau and a linear fall (wsd), half a cosine (cosine), or a linear fall from the peak
    to the end of the run (linear)."""
    warmup_share: Share = 0.02
    """Share of the run in which the rates rise."""
    cooldown_share: Share = 0.4
    """Share of the run, at its end, in which the rates fall linearly; of wsd."""
    final_lr_share: Share = 0.01
    """Rate at both ends of the run as a share of the peak."""
    grad_clip: Amount = 1.0
    """Largest global gradient norm; larger ones are scaled down. 0 = never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (total := self.warmup_share + self.cooldown_share) > 1:
            raise ValueError(f"optim.warmup_share + optim.cooldown_share = {total} must not exceed 1")
        if self.final_lr_share == 0:
            raise ValueError("optim.final_lr_share=0.0 must be above 0: a step at rate 0 trains nothing")
        if self.matrices == "adamw" and (self.orthogonalization != "newton-schulz" or self.equal_rows):
            name = "equal_rows" if self.equal_rows else "orthogonalization"
            raise ValueError(f"optim.{name} is of Muon; with optim.matrices=adamw leave it out")
        if self.lora_rank and self.matrices != "adamw":
            raise ValueError(f"optim.lora_rank={self.lora_rank} learns by AdamW; set optim.matrices to adamw")


FIELDS = (
    "structure",
    "src",
    "dst",
    "time",
    "rtt",
)  # of a token; its number is its place here. Each has a weight in [loss]


@dataclass(frozen=True)
class LossConfig(Section):
    structure: Amount = 1.0
    """Weight of measurement starts and of the tokens that choose which field comes next."""
    src: Amount = 1.0
    """Weight of the source bytes in the training loss."""
    dst: Amount = 1.0
    """Weight of the destination bytes."""
    time: Amount = 1.0
    """Weight of the timestamp bytes."""
    rtt: Amount = 1.0
    """Weight of the RTT bytes and the FAILED token."""
    smoothing: Amount = 0.0
    """Deviation of the normal distribution that training takes for its target in place of one RTT code, in codes of 1/2048
    of an octave. 0 = the code alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(self, name) for name in FIELDS):
            raise ValueError("one weight of [loss] must be above 0, else nothing is learned")


@dataclass(frozen=True)
class TrainConfig(Section):
    run_dir: Path = field(default=Path("runs/tiny"), metadata=RESUMABLE)
    """Folder of checkpoints, metrics.jsonl and the resolved config; one that holds a checkpoint is continued."""
    init_from: str = ""
    """Run folder, checkpoint, exported folder or OWNER/NAME of the hub, whose weights the run begins with. Empty = weights
    by its own seed."""
    total_steps: Whole = 1000
    """Optimiser steps in the run. The run ends at the first of the limits total_steps, target_tokens and max_minutes
    that it reaches, and the schedules stretch over that one. 0 = no limit."""
    target_tokens: Whole = 0
    """Tokens trained on, padding not counted. 0 = no limit."""
    max_minutes: Amount = 0.0
    """Minutes of training steps; compilation, evaluations and saves are not counted. 0 = no limit."""
    batch_size: Count = 64
    """Windows in one optimiser step, over all processes and micro-batches."""
    first_batch_size: Whole = 0
    """Windows in the first steps: batch_size halved some times, which doubles back over batch_warmup_steps. Rates stay as
    they are. 0 = batch_size."""
    batch_warmup_steps: Whole = 0
    """Steps, about, in which the batch grows from first_batch_size to batch_size, as many at each size."""
    grad_accum: Count = field(default=1, metadata=RESUMABLE)
    """Micro-batches of each process in one step; batch_size must be a multiple of them times the processes."""
    average: Share = 0.0
    """Share of the steps taken so far, the latest, over which the weights are averaged that evaluations and queries use:
    about their mean age. 0 = the weights after the last step."""
    average_ema: Share = 0.0
    """In place of train.average an exponential moving average: the share of it that each step keeps. 0.999 averages over
    about the latest 1,000 steps, and over all as long as there are fewer. 0 = none."""
    average_tail: Share = 0.0
    """In place of train.average the plain mean over this share of the run, at its end; until then the weights themselves.
    0 = none."""
    device: str = field(default="auto", metadata=RESUMABLE)
    """cpu, cuda, or auto: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """Of the forward pass; auto = bf16 if the device on which the run begins multiplies it natively, else fp32. Logits and
    loss are always fp32. fp16, for GPUs without bf16, scales the loss so that small gradients do not vanish. fp8, for wide
    models on Ada, Hopper and later GPUs, is bf16 but for the products of the blocks' matrices in training steps."""
    deterministic: Annotated[bool, tyro.conf.arg(aliases=["--deterministic"])] = field(
        default=False, metadata=RESUMABLE
    )
    """On GPUs, take only algorithms that give the same bits each time, which are slower; on CPUs all of them do."""
    compile: Literal["auto", True, False] = field(default="auto", metadata=RESUMABLE)
    """torch.compile the model; auto = on a GPU, where steps become much faster and take less memory."""
    checkpoint_every: Count = field(default=500, metadata=RESUMABLE)
    """Steps between checkpoints, which a thread writes while training goes on; the last step is always saved."""
    keep_checkpoints: Count = field(default=2, metadata=RESUMABLE)
    """Newest checkpoints kept, besides the best of those that were evaluated."""
    eval_every: Count = field(default=250, metadata=RESUMABLE)
    """Steps between evaluations on the fixed windows of val."""
    eval_windows: Count = 256
    """Fixed windows of val."""
    eval_queries: Whole = 256
    """Fixed pings of val whose RTT each evaluation queries, exactly; 0 = none."""
    sample_every: Whole = field(default=1000, metadata=RESUMABLE)
    """Steps between samples of the model: generated measurements and one RTT. 0 = never."""
    log_every: Count = field(default=10, metadata=RESUMABLE)
    """Steps between lines of metrics.jsonl."""
    wandb: Literal["disabled", "offline", "online"] = field(default="disabled", metadata=RESUMABLE)
    """Weights & Biases logging, beside metrics.jsonl."""
    wandb_project: str = field(default="ping-llm", metadata=RESUMABLE)
    """Weights & Biases project."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.total_steps or self.target_tokens or self.max_minutes):
            limits = "train.total_steps, train.target_tokens and train.max_minutes"
            raise ValueError(f"give one of {limits}, else no run ends")
        averages = [name for name in ("average", "average_ema", "average_tail") if getattr(self, name)]
        if len(averages) > 1:
            both = " and ".join(f"train.{name}={getattr(self, name)}" for name in averages)
            raise ValueError(f"{both} are averages of the same weights; leave one")
        self._check_batch_warmup()
        self.check_processes(1)

    @property
    def averages(self) -> bool:
        """Whether the weights that evaluations and queries use are an average."""
        return bool(self.average or self.average_ema or self.average_tail)

    def _check_batch_warmup(self) -> None:
        first, steps = self.first_batch_size, self.batch_warmup_steps
        if bool(first) != bool(steps):
            have, lack = ("first_batch_size", "batch_warmup_steps")[:: 1 if first else -1]
            raise ValueError(f"train.{have}={getattr(self, have)} needs a train.{lack} above 0 beside it")
        sizes = [self.batch_size >> halvings for halvings in range(self.batch_size.bit_length())]
        halves = [size for place, size in enumerate(sizes) if size << place == self.batch_size][1:]
        if first and first not in halves:
            which = f"one of {', '.join(map(str, halves))}" if halves else "left out, for no half of that is whole"
            raise ValueError(
                f"train.first_batch_size={first} must be halves of train.batch_size={self.batch_size}: {which}"
            )

    def check_processes(self, processes: int) -> None:
        """ValueError unless a step's windows can be dealt to so many processes and their micro-batches."""
        pieces = processes * self.grad_accum
        if self.batch_size % pieces:
            among = f" times the {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"train.batch_size={self.batch_size} must be a multiple of train.grad_accum={self.grad_accum}{among}; "
                f"pass --train.batch-size {max(1, round(self.batch_size / pieces)) * pieces}"
            )
        if self.first_batch_size % processes:
            first = f"train.first_batch_size={self.first_batch_size}"
            raise ValueError(f"{first} must be a multiple of the {processes} processes; let the batch begin larger")


@dataclass(frozen=True)
class Config(Section):
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: Annotated[int, Bounds(0, 2**63 - 1)] = 0
    """Seed of the windows and their order, and of the initial weights unless those have their own."""
    init_seed: Annotated[int, Bounds(0, 2**63 - 1)] = 0
    """Seed of the initial weights alone; 0 = that of the windows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data.replayed(self.train.batch_size)
        if self.data.short_windows and self.data.short_len > self.model.seq_len:
            raise ValueError(
                f"data.short_len={self.data.short_len} must not exceed model.seq_len={self.model.seq_len}: such windows are "
                "short ones"
            )
        if self.optim.lora_rank and not self.train.init_from:
            raise ValueError(
                f"optim.lora_rank={self.optim.lora_rank} changes given weights; name them: train.init_from"
            )
        if self.optim.lora_rank >= self.model.n_embd:
            raise ValueError(
                f"optim.lora_rank={self.optim.lora_rank} must be below model.n_embd={self.model.n_embd}: a change of that "
                "rank is any change; 0 learns all weights"
            )
        if self.train.precision != "fp8":
            return
        width, multiple = self.model.n_embd, FP8_MULTIPLE
        if width % multiple or width < FP8_LEAST_WIDTH:
            needs = f"train.precision=fp8 needs a model.n_embd of at least {FP8_LEAST_WIDTH}, a multiple of {multiple}"
            raise ValueError(f"{needs}, not {width}; pass --train.precision bf16")
        if (shared := self.model.kv_heads * self.model.head_width) % multiple:
            needs = (
                f"train.precision=fp8 needs heads of keys and values that are a multiple of {multiple} wide together"
            )
            raise ValueError(f"{needs}, not {shared}: change model.n_kv_head, or pass --train.precision bf16")
        if self.model.seq_len % multiple:
            needs = f"train.precision=fp8 needs a model.seq_len that is a multiple of {multiple}"
            raise ValueError(f"{needs}, not {self.model.seq_len}; pass --train.precision bf16")
        if self.data.short_windows and self.data.short_len % multiple:
            needs = f"train.precision=fp8 needs a data.short_len that is a multiple of {multiple}"
            raise ValueError(f"{needs}, not {self.data.short_len}; pass --train.precision bf16")

    @property
    def place_tokens(self) -> int:
        """Tokens that a step shows the model at each place of its batch: those of a window, and of the short ones beside."""
        return self.model.seq_len + self.data.short_windows * self.data.short_len

    @property
    def weights_seed(self) -> int:
        """Seed of the initial weights."""
        return self.init_seed or self.seed
