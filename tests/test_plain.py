"""Shards without an index, streamed through webdataset: divided, shuffled, refused where damaged, and never trusted."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import batched, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import run, tensor_files

from gandist import checkpoint
from gandist.data import plain
from gandist.data.opening import open_batches
from gandist.data.pack import npy_bytes
from gandist.data.plain import PlainStream
from gandist.recipe import DataOptions

LENGTHS = (7, 12, 5, 20, 9)
SAMPLES = sum(LENGTHS)
NUMBERS = [range(sum(LENGTHS[:n]), sum(LENGTHS[: n + 1])) for n in range(len(LENGTHS))]  # of each shard's samples
READER = ("data.reader=webdataset", "data.buffer=4")
PATTERN = "train-{{000000..{:06d}}}.tar"
