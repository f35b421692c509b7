"""Mutants of matrices that stay in 4-bit groups: which, what they take, how they are read and joined."""

from __future__ import annotations

from mutant import Mutant

_DECISION = [
    Mutant("checkpoint/int4.py", "bits != 4 or ", ""),
    Mutant("checkpoint/int4.py", "matrix.columns % matrix.group or ", ""),
    Mutant("checkpoint/int4.py", " or matrix.group % _LINE_NUMBERS", ""),
    Mutant("checkpoint/int4.py", " + (matrix.zeros is not None)", ""),
    Mutant("checkpoint/int4.py", "0 if index is None else _ORDER_BYTES * matrix.columns", "0"),
    Mutant("checkpoint/int4.py", "stored.kind == GGUF_Q4_0 and ", ""),
    Mutant("checkpoint/int4.py", " and piece.value_part is None", ""),
    Mutant("checkpoint/int4.py", "_PADDING_BYTES = 4", "_PADDING_BYTES = 0"),
    Mutant("checkpoint/layout.py", "key not in apart and not matrix.exact and ", ""),
    Mutant("checkpoint/layout.py", "all(name in as_stored", "any(name in as_stored"),
    Mutant("checkpoint/layout.py", "EMBEDDING if spec.tied_embeddings else HEAD, head_bytes", "HEAD, head_bytes"),
    Mutant("checkpoint/sizes.py", ' and model.quantization == "none" and not part', ""),
]

_NUMBERS = [
    Mutant("model/weights/quantised/int4.py", "(zeros + matrix.zero_offset) & 15", "zeros + matrix.zero_offset"),
    Mutant("model/weights/quantised/int4.py", "torch.argsort(index, stable=True)", "torch.argsort(index.flip(0))"),
    Mutant("model/weights/quantised/int4.py", "zeros is None or bool((zeros == CENTRE).all())", "True"),
    Mutant("model/weights/quantised/int4.py", "not bool((index < 0).any())", "True"),
    Mutant("model/ops/int4.py", "torch.equal(part.order, first.order)", "True"),
    Mutant(
        "model/ops/int4.py", "zeros = None if matrix.zeros is None else reorder(matrix.zeros)", "zeros = matrix.zeros"
    ),
    Mutant(
        "model/ops/int4.py",
        "torch.empty_like(stored).index_copy_(1, matrix.order.long(), stored)",
        "stored.index_select(1, matrix.order.long())",
    ),
    Mutant("model/ops/int4.py", "if any(part.zeros is not None", "if all(part.zeros is not None"),
    Mutant("model/ops/int4.py", "part.group != first.group or ", ""),
    Mutant("model/ops/int4.py", "len(found) < len(parts) or ", ""),
    Mutant("model/ops/int4.py", "if len(dtypes) == 1 else part.scales.float()", "if True else part.scales.float()"),
]

MUTANTS = [*_DECISION, *_NUMBERS]
