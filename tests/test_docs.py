"""The commands of docs/data.md, run as they stand there, one after the other."""

from __future__ import annotations

import glob
import io
import re
import shlex
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import ROOT, TINY
from PIL import Image
from test_storage import Server

BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]


def png(*size: int, mode: str = "RGB", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 2 if mode == "L" else 256, (*size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if mode == "L" else pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the page speaks of, and a server that has two shards."""
    monkeypatch.chdir(tmp_path)
    for number in range(24):
        path = tmp_path / "PHOTOS" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(70, 80, seed=number))
    with tarfile.open("scenes.tar", "w") as tar:
        for number in range(10):
            for folder, mode in (("images", "RGB"), ("masks", "L")):
                info = tarfile.TarInfo(f"scenes/{folder}/{number}.png")
                data = png(20, 30, mode=mode, seed=number)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (tmp_path / "table.csv").write_text(
        "path,label\n" + "".join(f"PHOTOS/{('cat', 'dog')[n % 2]}/{n}.png,{n % 3}\n" for n in range(12))
    )
    np.save("signals.npy", np.random.default_rng(0).normal(size=(20, 2, 50)).astype(np.float32))
    (tmp_path / "theirs").mkdir()
    with webdataset.ShardWriter("theirs/s-%03d.tar", maxcount=8, verbose=0) as sink:
        for number in range(32):
            sink.write({"__key__": f"{number:04d}", "png": png(16, 16, seed=number), "cls": str(number % 2)})
    text = TINY.format(data="datasets/photos", folder="runs/x", images=64, generator="{kind: mlp, width: 8}", discriminator="{kind: mlp, width: 8}")  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(text)
    server = Server()
    server.files = {f"/shards/train-{n:06d}.tar": Path(f"theirs/s-{n:03d}.tar").read_bytes() for n in range(2)}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield tmp_path / f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_every_command_of_the_page_on_data_does_what_it_says(gandist: Callable, place: Path) -> None:
    assert len(COMMANDS) >= 14
    for command in COMMANDS:
        words = shlex.split(command.replace("HOST", place.name))
        assert words[0] == "gandist"
        found = [path for word in words[1:] for path in (sorted(glob.glob(word)) if "*" in word else [word])]
        result = gandist(*found)
        assert result.code == 0, f"{command}\n{result.out}\n{result.err}"
        assert "Traceback" not in result.err
    assert Image.open("inspect.png").width > 100
