"""Memory limits of control groups, as the kernel's two interfaces write them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from osaurus_grpc.models import cgroup, platform
from osaurus_grpc.models.cgroup import available_bytes


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def membership(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "self"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_version_2_takes_the_tightest_group_on_the_way_up(tmp_path):
    mount = tmp_path / "cgroup"
    group(mount / "a" / "b", max="max", current=100, stat="anon 1\ninactive_file 40")
    group(mount / "a", max=1000, current=700, stat="anon 1\ninactive_file 200\nactive_file 9")
    assert available_bytes(mount, membership(tmp_path, "0::/a/b")) == 500
    group(mount / "a" / "b", max=120)
    assert available_bytes(mount, membership(tmp_path, "0::/a/b")) == 60
    group(mount / "a" / "b", max=50, stat="anon 1")
    assert available_bytes(mount, membership(tmp_path, "0::/a/b")) == 0


def test_version_1_has_a_tree_for_memory_alone(tmp_path):
    mount = tmp_path / "cgroup"
    group(mount / "memory" / "job", limit_in_bytes=900, usage_in_bytes=300, stat="total_inactive_file 100")
    group(mount / "memory", limit_in_bytes=2**63 - 4096, usage_in_bytes=300, stat="cache 1")
    lines = ("5:devices:/", "4:memory,hugetlb:/job", "0::/")
    assert available_bytes(mount, membership(tmp_path, *lines)) == 700


def test_inside_a_container_the_groups_path_may_be_the_hosts(tmp_path):
    mount = tmp_path / "cgroup"
    group(mount, max=1000, current=400, stat="inactive_file 0")
    assert available_bytes(mount, membership(tmp_path, "0::/system.slice/docker-1.scope")) == 600


@pytest.mark.parametrize("lines", [(), ("0::/",), ("4:memory:/x", "nonsense", "::")])
def test_no_limit_is_none(tmp_path, lines):
    assert available_bytes(tmp_path / "none", membership(tmp_path, *lines)) is None
    assert available_bytes(tmp_path, tmp_path / "missing") is None


def test_the_limit_bounds_what_models_may_take(monkeypatch):
    if platform.device() is not platform.Device.CPU:
        pytest.skip("an accelerator has a memory of its own")
    monkeypatch.setattr(cgroup, "available_bytes", lambda: 12_345)
    assert platform.memory_bytes() == 12_345
    monkeypatch.setattr(cgroup, "available_bytes", lambda: 2**60)
    assert 0 < platform.memory_bytes() <= psutil.virtual_memory().total
