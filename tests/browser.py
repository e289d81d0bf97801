"""A real Chromium for tests of pages, in a process of its own: the one inside Qt WebEngine, drawing to memory.

`Browser` starts it and hands it orders, one line of JSON each; run as a script, this file is that process. It keeps a
list of every address that a page asks for and of every message on its console.

Must never know of layerprobe.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

__all__ = ["Browser", "is_installed"]

_SECONDS = 30


def is_installed() -> bool:
    """Tell whether the extra `browser` is there."""
    return (
        importlib.util.find_spec("PyQt6") is not None and importlib.util.find_spec("PyQt6.QtWebEngineCore") is not None
    )


class Browser:
    """One Chromium with one page, on a system that prefers light or dark; a context manager."""

    def __init__(self, is_dark: bool = False) -> None:
        self._is_dark = is_dark
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Browser":
        # what the system prefers: 0 is dark, 1 is light
        flags = f"--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={0 if self._is_dark else 1}"
        chromium = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": flags}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, **chromium},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(_SECONDS)
        self._process.stdout.close()

    def ask(self, order: str, **what: Any) -> Any:
        """Give an order and wait until it is done."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"order": order, **what}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the browser is gone: exit code {self._process.wait(_SECONDS)} at {order} {what}")
        found = json.loads(answer)
        if "error" in found:
            raise RuntimeError(f"{order} {what}: {found['error']}")
        return found["value"]

    def load(self, path: Path, width: int = 1400, height: int = 1000) -> None:
        """Open a file and wait until it is loaded."""
        self.ask("load", path=str(path.resolve()), width=width, height=height)

    def run(self, code: str) -> Any:
        """Evaluate JavaScript; the value must be JSON."""
        return json.loads(self.ask("run", code=f"JSON.stringify(({code}) ?? null)"))

    def until(self, code: str) -> None:
        """Wait until an expression holds."""
        self.ask("until", code=code)

    def hover(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window."""
        self.ask("mouse", steps=[["move", x, y]])

    def click(self, x: float, y: float) -> None:
        """Press and let go."""
        self.ask("mouse", steps=[["move", x, y], ["press", x, y], ["release", x, y]])

    def drag(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """Press, move, let go."""
        middle = ["move", (x + to_x) / 2, (y + to_y) / 2]
        self.ask(
            "mouse", steps=[["move", x, y], ["press", x, y], middle, ["move", to_x, to_y], ["release", to_x, to_y]]
        )

    def type(self, text: str) -> None:
        """Press keys in what has the focus."""
        self.ask("type", text=text)

    def press(self, key: str) -> None:
        """Press one key by its name, such as `Right`."""
        self.ask("press", key=key)

    def shoot(self, path: Path, height: int | None = None) -> None:
        """Take a picture of the window as PNG."""
        self.ask("shoot", path=str(path), height=height)

    @property
    def requests(self) -> list[str]:
        """Every address asked for since the page was loaded, itself included."""
        return self.ask("requests")

    @property
    def console(self) -> list[str]:
        """Every message on the console since the page was loaded."""
        return self.ask("console")


def _serve() -> None:
    # by name, since type checkers run where the extra is not installed
    core, gui, test, engine, views, widgets = (
        cast("Any", importlib.import_module(f"PyQt6.{name}"))
        for name in ("QtCore", "QtGui", "QtTest", "QtWebEngineCore", "QtWebEngineWidgets", "QtWidgets")
    )
    application = widgets.QApplication(["browser"])
    requests: list[str] = []
    console: list[str] = []

    class Watch(engine.QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info: Any) -> None:
            requests.append(info.requestUrl().toString())
            # off the machine nothing goes, whatever the page says
            info.block(info.requestUrl().scheme() not in ("file", "data", "blob"))

    class Page(engine.QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: str | None, line: int, source: str | None) -> None:
            console.append(str(message))

    profile = engine.QWebEngineProfile()
    watch = Watch()
    profile.setUrlRequestInterceptor(watch)
    view = views.QWebEngineView()
    view.setPage(Page(profile, view))

    def wait(begin: Any) -> Any:
        """Run the event loop until what was begun calls back."""
        loop, found = core.QEventLoop(), []

        def done(value: Any = None) -> None:
            found.append(value)
            loop.quit()

        core.QTimer.singleShot(_SECONDS * 1000, loop.quit)
        begin(done)
        if not found:
            loop.exec()
        if not found:
            raise TimeoutError(f"nothing within {_SECONDS} s")
        return found[0]

    def pause(milliseconds: int) -> None:
        wait(lambda done: core.QTimer.singleShot(milliseconds, done))

    def run(code: str) -> Any:
        return wait(lambda done: view.page().runJavaScript(code, done))

    def load(path: str, width: int, height: int) -> None:
        requests.clear()
        console.clear()
        view.resize(width, height)
        view.show()

        def begin(done: Any) -> None:
            view.loadFinished.connect(done, core.Qt.ConnectionType.SingleShotConnection)
            view.load(core.QUrl.fromLocalFile(path))

        if not wait(begin):
            raise RuntimeError("the page was not loaded")

    def until(code: str) -> None:
        for _ in range(_SECONDS * 50):
            if run(f"Boolean({code})"):
                return
            pause(20)
        raise TimeoutError(f"not within {_SECONDS} s")

    def mouse(steps: list[list[Any]]) -> None:
        kinds = {
            "move": core.QEvent.Type.MouseMove,
            "press": core.QEvent.Type.MouseButtonPress,
            "release": core.QEvent.Type.MouseButtonRelease,
        }
        left, none = core.Qt.MouseButton.LeftButton, core.Qt.MouseButton.NoButton
        held = none
        target = view.focusProxy()
        for kind, x, y in steps:
            held = left if kind == "press" else none if kind == "release" else held
            at = core.QPointF(x, y)
            button = none if kind == "move" else left
            event = gui.QMouseEvent(
                kinds[kind], at, core.QPointF(view.mapToGlobal(at)), button, held, core.Qt.KeyboardModifier(0)
            )
            widgets.QApplication.sendEvent(target, event)
            # moves that come at once are joined into one
            pause(30)

    def shoot(path: str, height: int | None) -> None:
        if height is not None:
            view.resize(view.width(), height)
        pause(600)
        if not view.grab().save(path):
            raise OSError(f"{path} cannot be written")

    orders: dict[str, Any] = {
        "load": load,
        "run": lambda code: run(code),
        "until": until,
        "mouse": mouse,
        "type": lambda text: test.QTest.keyClicks(view.focusProxy(), text),
        "press": lambda key: test.QTest.keyClick(view.focusProxy(), getattr(core.Qt.Key, f"Key_{key}")),
        "shoot": shoot,
        "requests": lambda: list(requests),
        "console": lambda: list(console),
    }
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"value": orders[asked.pop("order")](**asked)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    view.close()
    view.setPage(None)
    application.quit()
    # Chromium's threads outlive the event loop; there is nothing left to keep
    os._exit(0)


if __name__ == "__main__":
    _serve()
