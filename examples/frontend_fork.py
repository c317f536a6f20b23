"""Ask several questions about one document at once, with SGLang's frontend language.

The summary computes the document, whose exact keys and values stay in the radix tree. Each branch of the fork finds
them there and is compressed anew, for its own question.

    make serve MODEL=.models/smollm2
    python examples/frontend_fork.py LICENSE
"""

import argparse
from pathlib import Path

import sglang as sgl

QUESTIONS = ("What does this text grant?", "What does it forbid?", "Who wrote it?")


@sgl.function
def ask_about(s, document, questions):
    s += f"{document}\n\nIn one sentence, this text says that"
    s += sgl.gen("summary", max_tokens=24, temperature=0, stop="\n")
    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += f"\n\nQuestion: {question}\nAnswer:"
        branch += sgl.gen("answer", max_tokens=32, temperature=0, stop="\n")
    branches.join()
    s["branches"] = [(branch["answer"], branch.get_meta_info("answer")) for branch in branches]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fork a program over one document.")
    parser.add_argument("document", type=Path)
    parser.add_argument("--characters", type=int, default=6000, help="how much of the document is read")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    args = parser.parse_args()

    sgl.set_default_backend(sgl.RuntimeEndpoint(args.url))
    text = args.document.read_text(encoding="utf-8")[: args.characters]
    state = ask_about.run(document=text, questions=QUESTIONS)
    print(f"This text says that {state['summary'].strip()}")
    for question, (answer, meta) in zip(QUESTIONS, state["branches"], strict=True):
        record = meta["kv_compressor"]
        print(f"{question} {answer.strip()}")
        print(
            f"  {meta['prompt_tokens']} prompt tokens, {meta['cached_tokens']} of them cached, "
            f"compressed: {record['compressed']}, {100 * record['resident_ratio']:.1f} % of stock's memory"
        )


if __name__ == "__main__":
    main()
