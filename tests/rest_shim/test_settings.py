from __future__ import annotations

from pathlib import Path

import pytest

from rest_shim.settings import Settings, is_loopback, read


@pytest.fixture(autouse=True)
def _no_file_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_defaults() -> None:
    assert read([]) == Settings()
    assert (Settings().host, Settings().port) == ("127.0.0.1", 1337)
    assert Settings().max_body_bytes == 32 * 1024 * 1024
    assert Settings().allowed_origins == ("*",)


def test_flags() -> None:
    made = read(
        ["--host", "::1", "--port", "0", "--core", "core:5", "--max-body-bytes", "1", "--insecure-expose",
         "--allowed-origin", "https://a", "--allowed-origin", "https://b", "--drain-seconds", "0",
         "--request-timeout-seconds", "1.5", "--keep-alive-interval-seconds", "2", "--log-level", "debug",
         "--send-timeout-seconds", "3", "--max-held-body-bytes", "0"]
    )  # fmt: skip
    assert made == Settings(
        host="::1", port=0, core="core:5", allowed_origins=("https://a", "https://b"), max_body_bytes=1,
        request_timeout_seconds=1.5, keep_alive_interval_seconds=2.0, drain_seconds=0.0,
        insecure_expose=True, log_level="debug", send_timeout_seconds=3.0,
        max_held_body_bytes=0,
    )  # fmt: skip


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[core]\nport = 1\n[rest]\nport = 2\nhost = "::1"\nallowed-origin = ["https://a"]\n')
    arguments = ["--config", str(file)]
    assert (read(arguments).port, read(arguments).host) == (2, "::1")
    assert read(arguments).allowed_origins == ("https://a",)
    monkeypatch.setenv("OSU_PORT", "3")
    assert read(arguments).port == 3
    assert read([*arguments, "--port", "4"]).port == 4


def test_the_file_of_the_home_directory_is_read(tmp_path: Path) -> None:
    (tmp_path / ".osaurus").mkdir()
    (tmp_path / ".osaurus" / "config.toml").write_text("[rest]\nmax-body-bytes = 5\n")
    assert read([]).max_body_bytes == 5


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "65536"],
        ["--port", "x"],
        ["--max-body-bytes", "0"],
        ["--keep-alive-interval-seconds", "0"],
        ["--request-timeout-seconds", "nan"],
        ["--log-level", "loud"],
        ["--prot", "1"],
    ],
)
def test_wrong_flags_end_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(arguments)
    assert caught.value.code == 2
    assert "usage: osaurus-rest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
        ("LocalHost.", True), ("a.localhost", True), ("192.0.2.1", False), ("::", False), ("", False),
        ("10.0.0.1", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
        ("evillocalhost", False),
    ],
)  # fmt: skip
def test_loopback_names(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
