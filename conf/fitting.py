"""Whether a plan fits a model: what ranks are to share can be shared, each refusal one line that names keys."""

from collections.abc import Iterator

from parallel.config import ContextMethod, ParallelConfig
from parallel.config_fit import Sizes, check_context, check_tensor
from trainer.config import OptimConfig, OptimKind
from trainer.config_schedule import ScheduleConfig
from zoo.config import BlockConfig, ModelConfig


def check_model(model: ModelConfig, *, plan: ParallelConfig, sizes: Sizes, seq_len: int) -> None:
    """Whether the ranks of a plan can share a model, rows of ``seq_len`` tokens and the vocabulary.

    Raises:
        ValueError: something does not divide, or a way of sharing cannot do what a layer needs.
    """
    _check_experts(model, ep=sizes.ep)
    _check_tensor(model, sizes=sizes, seq_len=seq_len)
    check_context(plan, seq_len=seq_len)
    if sizes.cp > 1:
        _check_rows(model, method=plan.context, sizes=sizes)


def check_theta(model: ModelConfig, schedule: ScheduleConfig) -> None:
    """Whether a model has the rotary angles that a schedule changes.

    Raises:
        ValueError: it has not.
    """
    turning = sorted(
        kind
        for kind, block in model.blocks.items()
        if block.mla is not None or (block.attention is not None and block.attention.rope is not None)
    )
    for i, change in enumerate(schedule.theta):
        if not turning:
            raise ValueError(f"schedule.theta[{i}].theta={change.theta}: no layer of the model has rotary positions")
        unknown = sorted(set(change.kinds) - set(turning))
        if unknown:
            allowed = f"kinds of layer with rotary positions ({', '.join(turning)})"
            raise ValueError(f"schedule.theta[{i}].kinds={unknown}: must be {allowed}")


def check_clip(model: ModelConfig, optim: OptimConfig) -> None:
    """Whether QK-Clip can hold the attention logits of a model.

    Raises:
        ValueError: a layer normalises queries and keys, or none attends.
    """
    if optim.qk_clip is None:
        return
    key = f"optim.kind={optim.kind}" if optim.kind is OptimKind.muonclip else "optim.qk_clip={…}"
    attending = {where: block for where, block in _blocks(model) if block.deltanet is None}
    if not attending:
        raise ValueError(f"{key}: QK-Clip is for softmax attention, which no layer of the model has")
    for where, block in attending.items():
        if block.attention is not None and block.attention.qk_norm is not None:
            raise ValueError(
                f"{key}: {where}.attention.qk_norm must be null: normalised, logits do not follow the weights"
            )


def _blocks(model: ModelConfig) -> Iterator[tuple[str, BlockConfig]]:
    """Kinds of layer that occur, each with where its config is."""
    for kind in dict.fromkeys(model.kinds):
        yield f"model.blocks.{kind}", model.blocks[kind]


def _check_experts(model: ModelConfig, *, ep: int) -> None:
    """Whether ``ep`` ranks can share the experts of each layer that has any.

    Raises:
        ValueError: no layer has, or their number does not divide.
    """
    if ep == 1:
        return
    counts = {key: block.moe.n_experts for key, block in _blocks(model) if block.moe is not None}
    if not counts:
        raise ValueError(f"parallel.ep={ep}: must be 1 for a model without experts")
    for key, n in counts.items():
        if n % ep:
            raise ValueError(f"parallel.ep={ep}: must divide {key}.moe.n_experts ({n})")


def _check_tensor(model: ModelConfig, *, sizes: Sizes, seq_len: int) -> None:
    """Whether ranks of tp can share layers, the tokens of a row and the vocabulary.

    Raises:
        ValueError: something does not divide.
    """
    shared, kv_heads = {"train.seq_len": seq_len}, {}
    for where, block in _blocks(model):
        parts = {name: getattr(block, name) for name in ("attention", "mla", "deltanet", "mlp", "moe")}
        for name, part in parts.items():
            for key in ("n_heads", "n_k_heads", "d_ff", "d_expert", "d_shared"):
                whole = key == "d_expert" and not sizes.expert_tp
                if part is not None and key in vars(part) and not whole:
                    shared[f"{where}.{name}.{key}"] = vars(part)[key]
        if block.attention is not None:
            kv_heads[f"{where}.attention.n_kv_heads"] = block.attention.n_kv_heads
            norm = block.attention.qk_norm
            if sizes.tp > 1 and norm is not None and norm.scope == "width" and norm.kind != "rms":
                key = f"{where}.attention.qk_norm.kind"
                raise ValueError(f"{key}={norm.kind}: must be rms where scope is width and parallel.tp={sizes.tp}")
    check_tensor(sizes.tp, shared=shared, kv_heads=kv_heads, vocab_size=model.vocab_size)


def _check_rows(model: ModelConfig, *, method: ContextMethod, sizes: Sizes) -> None:
    """Whether ranks of cp, which have some tokens of each row, can see the others' in each kind of layer.

    Raises:
        ValueError: heads do not divide, or ring attention would have to do what it cannot.
    """
    for where, block in _blocks(model):
        if block.deltanet is not None:
            _check_heads(f"{where}.deltanet.n_k_heads", block.deltanet.n_k_heads, sizes=sizes)
        if method is ContextMethod.ulysses and block.mla is not None:
            _check_heads(f"{where}.mla.n_heads", block.mla.n_heads, sizes=sizes)
        if block.attention is None:
            continue
        if method is ContextMethod.ulysses:
            _check_heads(f"{where}.attention.n_heads", block.attention.n_heads, sizes=sizes)
            kv = max(block.attention.n_kv_heads // sizes.tp, 1)
            if kv % sizes.cp and sizes.cp % kv:
                key = f"{where}.attention.n_kv_heads ({block.attention.n_kv_heads})"
                of = f"{key} over parallel.tp" if sizes.tp > 1 else key
                raise ValueError(f"parallel.cp={sizes.cp}: must divide {of} or be a multiple of it")
        if method is ContextMethod.ring:
            c = block.attention
            ratio = c.temperature is not None and c.temperature.kind == "ratio"
            slots = {"softcap": c.softcap is not None, "sinks": c.sinks}
            for slot, there in (slots | {"temperature": ratio}).items():
                if there:
                    key = f"{where}.attention.{slot}"
                    raise ValueError(f"parallel.context=ring: cannot do {key}: must be gather or ulysses")


def _check_heads(key: str, n: int, *, sizes: Sizes) -> None:
    """Whether cp, after tp, divides a number of heads that are exchanged for tokens.

    Raises:
        ValueError: it does not.
    """
    if n % (sizes.cp * sizes.tp):
        by = f"parallel.cp={sizes.cp}" + (f" x parallel.tp={sizes.tp}" if sizes.tp > 1 else "")
        raise ValueError(f"{by}: must divide {key} ({n})")
