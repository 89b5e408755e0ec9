"""transformers' server, on a tiny model."""

import base64
import io
import json
import socket
import time
import urllib.request
from urllib.error import URLError

import pytest
from conftest import draw
from transformers.cli.serve import Serve
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from cm3leon_hf import cli_serve

QUESTION, TOKENS = "what is it?", 6


@pytest.fixture
def address(folder, monkeypatch):
    """Of a server of the tiny model, on a port that was free."""
    monkeypatch.setitem(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, "cm3leon", "")  # as it was when the test ends
    cli_serve.make_known_to_server()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = Serve(force_model=folder, port=port, device="cpu", non_blocking=True)
    yield f"http://localhost:{port}"
    server.kill_server()


def answer(address: str, content, model: str) -> str:
    asked = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": TOKENS}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(100):  # ten seconds, until it listens
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["choices"][0]["message"]["content"]
        except URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.1)
    raise TimeoutError(address)


def test_chats_are_answered_as_by_generate(address, folder, model, processor):
    picture, file = draw("red", "circle"), io.BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    about_picture = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    prompts = [processor.for_image_to_text(picture, QUESTION), processor(text=QUESTION)]
    for content, inputs in zip((about_picture, QUESTION), prompts):
        ids = model.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens=TOKENS)
        new = ids[:, inputs["input_ids"].shape[1] :]
        (wanted,) = processor.post_process_multimodal_output(new, generation_mode="text")
        assert answer(address, content, folder) == wanted
