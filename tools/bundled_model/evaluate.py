"""Measures an exported model beside the n-gram: `python -m bundled_model.evaluate DIR` writes its card.

Perplexity is per token, over every token of each held-out document but its BOS, the closing EOS included. The
network reads windows of 2,048 tokens that move by 1,024, so that after a document's first window each token is
predicted from at least 1,024 tokens before it; the n-gram reads the four tokens before each.
"""

import argparse
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from torch.nn import functional as F

from .baseline import Split, beginnings, load_split, ngram_figures
from .card import write_card
from .export import load_network
from .network import Network
from .tokenizer import END

WINDOW_TOKENS = 2_048
STRIDE_TOKENS = 1_024
LONGEST_REPLY_TOKENS = 400

CHATS = (
    ("What does os.path.join do?", "How do I call os.path.join?", "Thanks!"),
    ("What is the json module for?", "List the public names of json.", "What does json.dumps do?"),
    ("Explain the with statement.", "Tell me more.", "Thank you."),
    ("Hello!", "What does textwrap.dedent do?", "Show me the code of textwrap.dedent."),
    ("What is collections?", "What does collections.OrderedDict do?", "Great, thank you."),
    ("Tell me about threading.", "What does threading.Lock do?", "Write a function like shutil.copyfile."),
)
"""Three questions each; the model's own replies stand between them."""


@torch.no_grad()
def window_losses(network: Network, document: npt.NDArray[np.int64]) -> torch.Tensor:
    """Losses in nats of `document[1:]`, [len(document) - 1]; each token in the first window that contains it."""
    tokens = torch.from_numpy(document)
    losses: list[torch.Tensor] = []
    done = 1
    for start in range(0, len(document), STRIDE_TOKENS):
        window = tokens[start : start + WINDOW_TOKENS]
        fresh = start + len(window) - done
        if fresh <= 0:
            break
        logits = network(window[None, :-1])[0, -fresh:]
        losses.append(F.cross_entropy(logits, window[-fresh:], reduction="none"))
        done += fresh
    return torch.cat(losses)


def perplexity(network: Network, documents: Sequence[npt.NDArray[np.int64]]) -> float:
    """Perplexity per token, over all documents together."""
    return math.exp(torch.cat([window_losses(network, document) for document in documents]).double().mean().item())


def chat_figures(folder: Path) -> dict[str, int]:
    """Count the replies of the three-turn chats that end with the end-of-turn token. Prints the chats."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # training does not need it

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids(END)
    num_replies = num_ended = 0
    for questions in CHATS:
        talk: list[dict[str, str]] = []
        for question in questions:
            talk.append({"role": "user", "content": question})
            prompt = tokenizer.apply_chat_template(
                talk, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            tokens = model.generate(**prompt, max_new_tokens=LONGEST_REPLY_TOKENS)[0].tolist()
            answer = tokens[prompt["input_ids"].shape[1] :]
            talk.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
            num_replies += 1
            num_ended += answer[-1] == end
            print(f"> {question}\n{tokenizer.decode(answer)}\n", flush=True)
    return {
        "num_chats": len(CHATS),
        "replies": num_replies,
        "replies_ended": num_ended,
        "longest_reply_tokens": LONGEST_REPLY_TOKENS,
    }


def machine() -> str:
    """Description of this machine, without its name."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = f"{names[0]} ({len(names)} cores)" if names else model
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {platform.system()}"


def evaluate(folder: Path, num_threads: int) -> None:
    """Measure the model in `folder`, and write training.json and MODEL_CARD.md there."""
    torch.set_num_threads(num_threads)
    progress_file, facts_file = folder / "progress.json", folder / "training.json"
    run = json.loads(progress_file.read_text()) if progress_file.exists() else json.loads(facts_file.read_text())["run"]
    network = load_network(folder)
    split: Split = load_split(folder)
    figures: dict[str, float] = ngram_figures(split)
    print(figures, flush=True)
    figures["model"] = round(perplexity(network, split.held_out_text), 3)
    figures["beginnings_model"] = round(perplexity(network, beginnings(split.held_out_text)), 3)
    figures["conversations_model"] = round(perplexity(network, split.held_out_conversations), 3)
    print(figures, flush=True)
    facts = {
        "command": training_command(run),
        "run": run,
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "corpus": {
            "train_documents": len(split.train),
            "train_tokens": sum(map(len, split.train)),
            "held_out_documents": len(split.held_out_text),
            "held_out_tokens": sum(len(document) - 1 for document in split.held_out_text),
            "held_out_conversations": len(split.held_out_conversations),
            "held_out_conversation_tokens": sum(len(document) - 1 for document in split.held_out_conversations),
        },
        "evaluation": {"window_tokens": WINDOW_TOKENS, "stride_tokens": STRIDE_TOKENS},
        "held_out_perplexity": figures,
        "chat": chat_figures(folder),
    }
    facts_file.write_text(json.dumps(facts, indent=2) + "\n")
    write_card(folder, facts)


def training_command(run: dict[str, object]) -> str:
    """Command line of a training run."""
    options = f"--minutes {run['minutes']:g} --threads {run['threads']} --seed {run['seed']}"
    return (
        f"PYTHONPATH=tools python -m bundled_model.train {options}{' --compile' if run['compiled'] else ''} --out DIR"
    )


def main() -> None:
    """Read the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="an exported model, as train.py leaves it")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    evaluate(given.folder, given.threads)


if __name__ == "__main__":
    main()
