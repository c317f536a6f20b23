"""Ask a server about pictures with the OpenAI client, and see what compression did for the request.

Start a server, then run this:

    make serve MODEL=benchmarks/models/tiny-qwen2_5_vl-scenes
    python examples/openai_images.py

The pictures and the question are made for the tiny model above. For another model give your own:

    python examples/openai_images.py --question "What do these pictures have in common?" one.jpg two.jpg
"""

import argparse
import base64
import json
import mimetypes
from pathlib import Path

from openai import OpenAI

HERE = Path(__file__).parent
SCENE = [HERE / "scene-1.png", HERE / "scene-2.png"]


def as_url(path: Path) -> str:
    kind = mimetypes.guess_type(path)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask about pictures.")
    parser.add_argument("pictures", nargs="*", type=Path, default=SCENE)
    parser.add_argument("--question", default="chain A3")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    content = [{"type": "image_url", "image_url": {"url": as_url(path)}} for path in args.pictures]
    reply = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": [*content, {"type": "text", "text": args.question}]}],
        max_tokens=64,
        temperature=0,
        extra_body={"return_meta_info": True},  # SGLang's own; it cannot be had while streaming
    )
    print(reply.choices[0].message.content)
    print(json.dumps(reply.choices[0].meta_info["kv_compressor"]))


if __name__ == "__main__":
    main()
