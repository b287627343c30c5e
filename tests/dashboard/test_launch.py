import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from app.errors import ServiceError
from app.storage import Home
from dashboard import launch

ROOT = Path(__file__).parents[2]


def test_a_port_in_use_is_one_clear_error(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "dashboard.launch", str(recipe), "--port", str(port)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert f"cannot use port {port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_free_port_passes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        with pytest.raises(ServiceError):
            launch.check_port(port)
    launch.check_port(port)


def test_a_wrong_recipe_is_refused_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nserving: {prot: 1}\n")
    assert launch.main([str(recipe)]) == 1
    assert "did you mean `port`?" in capsys.readouterr().err


def test_what_depends_on_the_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFLOOP_HOME", raising=False)
    found = launch.environment(Path("r.yaml"), Home.from_environment())
    assert found["PREFLOOP_RECIPE"] == str(tmp_path / "r.yaml")
    assert found["PREFLOOP_HOME"] == str(tmp_path / ".prefloop")


def test_the_dashboard_binds_to_this_machine_only() -> None:
    words = launch.command(8501)
    assert words[words.index("--server.address") + 1] == "127.0.0.1"
    settings = tomllib.loads((launch.ROOT / ".streamlit" / "config.toml").read_text(encoding="utf-8"))
    assert settings["server"]["address"] == "127.0.0.1"
    assert settings["server"]["allowedHosts"] == ["127.0.0.1", "localhost"]
    assert settings["server"]["enableXsrfProtection"] is True
    assert settings["server"]["enableStaticServing"] is False
    assert settings["browser"]["gatherUsageStats"] is False
    assert settings["client"]["showErrorDetails"] == "none"


def test_no_file_of_the_room_shadows_the_package_app() -> None:
    # Streamlit puts the folder of the script first on the path.
    assert not (ROOT / "dashboard" / "app.py").exists()
    taken = sys.stdlib_module_names & {p.stem for p in (ROOT / "dashboard").glob("*.py")}
    assert taken <= {"__init__"}


def test_importing_the_room_loads_no_model_library() -> None:
    names = [p.stem for p in (ROOT / "dashboard").glob("*.py") if p.stem != "__init__"]
    program = "import sys\n" + "".join(f"import dashboard.{n}\n" for n in names)
    program += "print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
