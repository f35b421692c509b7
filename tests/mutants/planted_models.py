"""Mutants of how checkpoints of gpt-oss become the model's tensors, of its layers, and of four-bit floats."""

from mutant import Mutant

_FLOAT4 = "model/quantise/float4.py"

MUTANTS = [
    Mutant(_FLOAT4, "torch.where(low % 2 == 0, low, high)", "low"),
    Mutant(_FLOAT4, "for more in (0, 1):", "for more in (0,):"),
    Mutant(_FLOAT4, "exponent - 2 + more", "exponent - 1 + more"),
    Mutant(_FLOAT4, "torch.where(error < least_error,", "torch.where(error <= least_error,"),
    Mutant(_FLOAT4, ".tiny / 8", ".tiny"),
    Mutant(_FLOAT4, "    whole = whole.float().clamp(max=torch.finfo(torch.float32).max)\n", ""),
    Mutant(_FLOAT4, ".clamp(min=_LEAST_EXPONENT)", ""),
    Mutant("checkpoint/stacked.py", '("up_proj", 1, 2)', '("up_proj", 0, 2)'),
    Mutant("checkpoint/stacked.py", "match[1] + _GATE_BIAS in shapes", "True"),
    Mutant("checkpoint/stacked.py", " or shape[-1] % len(rows)", ""),
    Mutant("checkpoint/quantised/mxfp4.py", "scales.name, expert, first, step)", "scales.name, 0, first, step)"),
    Mutant("checkpoint/quantised/mxfp4.py", " or shape[1] % row_multiple", ""),
    Mutant("checkpoint/quantised/mxfp4.py", "        keys.know((), (", "        keys.know(keys.config, ("),
    Mutant("checkpoint/cuts.py", "(shard.even(heads),)", "(Piece(0, heads // shard.size, heads // shard.size),)"),
    Mutant(
        "model/weights/quantised/decode.py", "slice(start, stop + 1, matrix.step)", "slice(start, stop, matrix.step)"
    ),
    Mutant("model/weights/stacked_source.py", "part.first :: part.step", ":: part.step"),
    Mutant("model/decoder/experts.py", "torch.exp(best - best[:, :1])", "torch.exp(best - best[:, :1]) + 1.0"),
    Mutant(
        "model/ops/torch_attention.py",
        "total = total + torch.exp(sink - largest)\n        mixed",
        "pass\n        mixed",
    ),
    Mutant("model/ops/elementwise.py", "up.clamp(-CLAMPED_LIMIT, CLAMPED_LIMIT)", "up.clamp(max=CLAMPED_LIMIT)"),
    Mutant("checkpoint/gguf/special_ids.py", "if tokens[i] != _MESSAGE_END]", "if True]"),
    Mutant(
        "text/parsing/harmony.py",
        "        source.emit_read(kind)\n        yield from _text(source, kind)",
        "        yield from _text(source, kind)",
    ),
    Mutant("text/parsing/harmony.py", "Kind.REASONING if reading.is_thinking else Kind.CONTENT", "Kind.CONTENT"),
    Mutant("text/parsing/call_forms.py", 'if word.is_special("｜DSML｜"):', "if False:"),
    Mutant("text/parsing/call_forms.py", "if key in required else", "if key not in required else"),
    Mutant("text/parsing/call_forms.py", "is_exact = required <= properties.keys() and", "is_exact = True or"),
    Mutant("text/parsing/call_forms.py", "._replace(is_only_opener=False)", ""),
    Mutant("text/parsing/call_forms.py", "and schema.keys() <= _WORDS_OF_TEXT", ""),
    Mutant(
        "text/parsing/call_forms.py", ", **{name: keepable(root[name]) for name in _DEFINITIONS if name in root}", ""
    ),
    Mutant("text/parsing/call_forms.py", "{'+' if parallel else ''}", "+"),
    Mutant("text/parsing/grammar.py", "and form.is_only_opener and form.is_exact", ""),
    Mutant("text/tokenizer.py", "if token.special}\n    return tuple(special", "}\n    return tuple(special"),
]
