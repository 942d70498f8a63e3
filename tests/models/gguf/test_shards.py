from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open

from osaurus_grpc.models.platform import mx
from osaurus_grpc.models.sources.gguf.shards import ShardWriter, StoredTensor


def layer(number: int) -> list[StoredTensor]:
    return [
        StoredTensor(f"l{number}.weight", "U32", (6, 5)),
        StoredTensor(f"l{number}.scales", "U8", (3, 1)),
        StoredTensor(f"l{number}.biases", "F16", (3, 3)),
    ]


def values(tensor: StoredTensor) -> np.ndarray:
    dtype = {"U32": np.uint32, "F16": np.float16, "U8": np.uint8}[tensor.dtype]
    seed = sum(tensor.name.encode())
    return np.random.default_rng(seed).integers(0, 200, tensor.shape).astype(dtype)


def write(folder, groups, **options):
    with ShardWriter(folder, groups, **options) as writer:
        for group in groups:
            for tensor in group:
                data = values(tensor)
                row = data.nbytes // len(data)
                for index in reversed(range(len(data))):  # parts may come in any order
                    writer.write(tensor.name, index * row, data[index])


def test_one_shard(tmp_path):
    groups = [layer(0), layer(1)]
    write(tmp_path, groups)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx"}
        for tensor in (*groups[0], *groups[1]):
            np.testing.assert_array_equal(file.get_tensor(tensor.name), values(tensor))


@pytest.mark.parametrize(("limit", "count"), [(1, 4), (300, 2), (10_000, 1)])
def test_shards_keep_a_module_together(limit, count, tmp_path):
    groups = [layer(number) for number in range(4)]  # 141 bytes each
    write(tmp_path, groups, shard_bytes=limit)
    shards = sorted(tmp_path.glob("model*.safetensors"))
    assert len(shards) == count
    loaded = {}
    for shard in shards:
        held = mx.load(str(shard))
        assert len(held) % 3 == 0
        loaded |= held
    for tensor in (tensor for group in groups for tensor in group):
        np.testing.assert_array_equal(np.array(loaded[tensor.name]), values(tensor))
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() is (count > 1)
    if count > 1:
        assert shards[0].name == f"model-00001-of-{count:05}.safetensors"
        places = json.loads(index.read_text())
        assert places["metadata"]["total_size"] == 4 * 141
        for name, shard in places["weight_map"].items():
            assert name in mx.load(str(tmp_path / shard))
