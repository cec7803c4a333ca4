"""The explorer in a real browser: what a person sees of a layer, and what happens when something is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from poolrpc_server import Config, Server
from tests.browser.conftest import ROOT, axe
from tests.integration.conftest import gate, patch_operation  # noqa: F401 - fixtures
from tests.integration.http_calls import send

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from tests.browser.conftest import Explorer
    from tests.integration.conftest import Gate

    Opened = Callable[..., AbstractContextManager[Explorer]]

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def test_the_first_window(explorer: Explorer) -> None:
    """The page opens with MaxPool2d(2) on a plane of 4 x 4 numbers, its first window, its value and the shape rule."""
    assert explorer.cells("in") == [
        ["1", "3", "2", "4"],
        ["5", "6", "8", "7"],
        ["4", "2", "1", "0"],
        ["9", "7", "3", "2"],
    ]
    assert explorer.cells("out") == [["6", "8"], ["9", "3"]]
    assert explorer.window("in") == ["0 0 0", "0 0 1", "0 1 0", "0 1 1"]
    assert explorer.window("out") == ["0 0 0"]
    assert explorer.page.inner_text("#how") == "rows 0 to 1, columns 0 to 1: max 6 at (1, 1)"
    assert "floor((4 + 2*0 - 1*(2 - 1) - 1) / 2) + 1 = 2" in explorer.page.inner_text("#formulas")
    assert explorer.page.inner_text("#status") == "connected"


def test_windows_move(explorer: Explorer) -> None:
    """The buttons, the slider and a click on an output cell move the window; after the last one comes the first."""
    explorer.page.click("#next")
    assert explorer.window("in") == ["0 0 2", "0 0 3", "0 1 2", "0 1 3"]
    explorer.step_to(3)
    assert explorer.window("in") == ["0 2 2", "0 2 3", "0 3 2", "0 3 3"]
    assert explorer.page.inner_text("#window-number") == "4 of 4"
    explorer.page.click("#next")
    assert explorer.window("out") == ["0 0 0"]
    explorer.page.click("#previous")
    assert explorer.window("out") == ["0 1 1"]
    explorer.page.click("#out tr:nth-child(2) td:nth-child(1)")
    assert explorer.page.inner_text("#how").endswith("max 9 at (3, 0)")


def test_windows_move_by_themselves(opened: Opened) -> None:
    """They do at once, until they are paused; not for people who prefer less motion."""
    with opened(reduced_motion="no-preference") as explorer:
        explorer.page.wait_for_function("() => document.querySelector('#window').value === '2'")
        assert explorer.page.get_attribute("#play", "aria-label") == "Pause"
        explorer.page.click("#play")
        assert explorer.page.get_attribute("#play", "aria-label") == "Play"
        assert explorer.page.evaluate("state.timer") == 0
    with opened() as explorer:
        assert explorer.page.get_attribute("#play", "aria-label") == "Play"


def test_a_changed_parameter_changes_the_output(explorer: Explorer) -> None:
    """A parameter that is typed, or changed by its buttons or the arrow keys, has its output, shape and windows."""
    with explorer.next_run():
        explorer.page.fill("#layer-0-stride", "1")
    assert explorer.cells("out") == [["6", "8", "8"], ["6", "8", "8"], ["9", "7", "3"]]
    with explorer.next_run():
        explorer.page.press("#layer-0-kernel_size", "ArrowUp")
    assert explorer.cells("out") == [["8", "8"], ["9", "8"]]
    with explorer.next_run():
        explorer.page.locator("#layer-0-padding + button").click()
    assert explorer.page.input_value("#layer-0-padding") == "1"
    assert len(explorer.cells("out")) == 4
    assert explorer.cells("in")[0][0] == "\u00b7"  # padding
    with explorer.next_run():
        explorer.page.check("#layer-0-return_indices")
    explorer.page.select_option("#show", "indices")
    assert explorer.cells("out")[0] == ["5", "6", "6", "6"]
    assert "index 5" in explorer.page.inner_text("#how")


def test_a_value_may_be_one_for_each_axis(explorer: Explorer) -> None:
    """A pair is typed as Python writes it, or without parentheses."""
    for typed in ("(2, 1)", "2, 1"):
        with explorer.next_run():
            explorer.page.fill("#layer-0-kernel_size", typed)
        assert explorer.page.inner_text("#stage-title") == "MaxPool2d((2, 1))"
    assert explorer.cells("out") == [["5", "6", "8", "7"], ["9", "7", "3", "2"]]


def test_bad_parameters_have_the_servers_message_at_their_field(explorer: Explorer) -> None:
    """The message of the server is at the field of the parameter, until the parameter is right."""
    for typed, message in (
        ("0", "expected 1 to 65535, got 0"),
        ("two", "expected an integer or a tuple, got 'two'"),
        ("2.5", "expected an integer, got 2.5 (float)"),
        ("", "expected a value, got none"),
        ("9", "expected an effective kernel of at most the padded input, 4"),
    ):
        explorer.page.fill("#layer-0-kernel_size", typed)
        explorer.wait_for_error("layer-0-kernel_size", message)
        assert explorer.page.get_attribute("#layer-0-kernel_size", "aria-invalid") == "true"
        assert explorer.page.get_attribute("#stage", "data-stale") == ""
    explorer.page.fill("#layer-0-padding", "5")
    explorer.page.fill("#layer-0-kernel_size", "3")
    explorer.wait_for_error("layer-0-padding", "expected less than the span of a window, 3, got 5")
    with explorer.next_run():
        explorer.page.fill("#layer-0-padding", "1")
    assert (
        explorer.page.inner_text("#layer-0-kernel_size-error")
        == explorer.page.inner_text("#layer-0-padding-error")
        == ""
    )
    assert explorer.page.get_attribute("#layer-0-kernel_size", "aria-invalid") is None
    assert explorer.page.get_attribute("#stage", "data-stale") is None


def test_a_dtype_that_the_layer_lacks(explorer: Explorer) -> None:
    """The server's advice is at the layer; a step before it, as advised, is the remedy."""
    with explorer.next_run():
        explorer.page.select_option("#layer-0-name", "AvgPool2d")
    explorer.page.select_option("#dtype", "uint8")
    explorer.wait_for_error("layer-0", "layer[0]: AvgPool2d takes ")
    assert "got uint8; put ToDtype('float32') before it" in explorer.page.inner_text("#layer-0-error")
    explorer.page.click("#add")
    explorer.page.select_option("#layer-1-name", "ToDtype")
    with explorer.next_run():
        explorer.page.get_by_label("Move up layer 2").click()
    assert explorer.page.locator("#steps b").all_inner_texts() == ["input", "ToDtype('float32')", "AvgPool2d(2)"]


def test_a_chain_has_its_steps(explorer: Explorer) -> None:
    """Each layer of a chain shows its own input and output, and its shape; the chosen one is marked."""
    with explorer.next_run():
        explorer.page.click("#add")
    assert explorer.page.inner_text("#stage-title") == "AvgPool2d(2)"
    assert (explorer.cells("in"), explorer.cells("out")) == ([["6", "8"], ["9", "3"]], [["6.5"]])
    assert explorer.page.inner_text("#how").endswith("(6 + 8 + 9 + 3) / 4 = 6.5")
    explorer.page.click("#steps button:first-of-type")
    explorer.page.wait_for_function("() => document.querySelector('#stage-title').textContent === 'MaxPool2d(2)'")
    assert explorer.cells("out") == [["6", "8"], ["9", "3"]]
    assert explorer.page.get_attribute("#steps button:first-of-type", "aria-current") == "step"
    with explorer.next_run():
        explorer.page.get_by_label("Remove layer 2").click()
    assert explorer.page.locator("#steps button").count() == 1


def test_numbers_that_a_person_types(explorer: Explorer) -> None:
    """A grid is typed; what is not a grid has its message, and an empty line begins the next channel."""
    with explorer.next_run():
        explorer.page.select_option("#source", "grid")
    assert explorer.page.input_value("#grid").startswith("1 3 2 4\n5 6 8 7")
    with explorer.next_run():
        explorer.page.fill("#grid", "1, 2.5; -3\n4 nan 6")
    assert explorer.cells("in") == [["1", "2.5", "-3"], ["4", "NaN", "6"]]
    assert explorer.cells("out") == [["NaN"]]
    explorer.page.fill("#grid", "1 2\n3")
    explorer.wait_for_error("grid", "expected rows of 2 numbers, as the first has, got one of 1")
    explorer.page.fill("#grid", "1 x")
    explorer.wait_for_error("grid", "expected numbers, got x")
    with explorer.next_run():
        explorer.page.fill("#grid", "1 2\n3 4\n\n5 6\n7 8")
    assert explorer.page.locator("#plane option").count() == 2
    explorer.page.select_option("#plane", "1")
    explorer.page.wait_for_function("() => document.querySelector('#out td').textContent === '8'")


@pytest.mark.parametrize(("source", "layer", "shapes"), [
    ("signal", "MaxPool1d(2)", ["(16,) float32", "(8,) float32"]),
    ("volume", "MaxPool3d(2)", ["(4, 6, 6) float32", "(2, 3, 3) float32"]),
    ("digit", "MaxPool2d(2)", ["(12, 12) float32", "(6, 6) float32"]),
    ("photo", "MaxPool2d(2)", ["(3, 96, 96) float32", "(3, 48, 48) float32"]),
])  # fmt: skip
def test_examples(explorer: Explorer, source: str, layer: str, shapes: list[str]) -> None:
    """Each example has a layer of its number of axes, and windows that move over it."""
    with explorer.next_run():
        explorer.page.select_option("#source", source)
    assert explorer.page.inner_text("#stage-title") == layer
    assert explorer.page.locator("#steps small").all_inner_texts() == shapes
    explorer.step_to(5)
    assert explorer.page.inner_text("#window-number").startswith("6 of ")
    if source == "photo":
        assert explorer.page.inner_text("#how") == "rows 0 to 1, columns 10 to 11: 112, 161, 225"
    else:
        assert len(explorer.window("in")) == {"signal": 2, "volume": 8, "digit": 4}[source]


def test_every_layer_of_the_server(explorer: Explorer) -> None:
    """Every layer that the server describes can be chosen, and works with the values that it begins with."""
    names = explorer.page.eval_on_selector_all("#layer-0-name option", "options => options.map(each => each.value)")
    described = send(explorer.page.url.partition("://")[2].rstrip("/"), "/v1/info").json["layers"]
    assert sorted(names) == sorted(each["name"] for each in described)
    steps = {each["name"] for each in described if not each["spatial_dims"]}
    for name in names:
        if name in steps:
            continue  # which need a pooling layer too
        with explorer.next_run():
            explorer.page.select_option("#layer-0-name", name)
        assert explorer.page.inner_text("#stage-title").startswith(f"{name}(")
        assert explorer.page.locator("#out td, #out canvas").count() > 0
        assert explorer.page.locator("#controls .error:not(:empty)").count() == 0


def test_branches_are_shown_side_by_side(explorer: Explorer) -> None:
    """Further layers on the same input are typed, a chain on each line; each has its shapes and its output."""
    page = explorer.page
    assert page.is_hidden("#branches-card")
    with explorer.next_run():
        page.fill("#branches", "AvgPool2d(2)\n[MaxPool2d(2), AvgPool2d(2)]\n")
    assert page.locator("#branch-boards b").all_inner_texts() == [
        "MaxPool2d(2)",
        "AvgPool2d(2)",
        "[MaxPool2d(2), AvgPool2d(2)]",
    ]
    assert page.locator("#branch-boards small").all_inner_texts() == [
        "(2, 2) float32",
        "(2, 2) float32",
        "(2, 2) \u2192 (1, 1) float32",
    ]
    assert page.locator("#branch-boards td").all_inner_texts() == [
        "6",
        "8",
        "9",
        "3",
        "3.75",
        "5.25",
        "5.5",
        "1.5",
        "6.5",
    ]
    tops = {page.locator("#branch-boards figure").nth(i).bounding_box()["y"] for i in range(3)}  # type: ignore[index]
    assert len(tops) == 1
    page.fill("#branches", "AvgPool2d(2)\nMaxPool2d(0)")
    explorer.wait_for_error("branches", "branches[1]: ")
    page.fill("#branches", "MaxPool2d(9)")
    explorer.wait_for_error("branches", "branches[0][0].kernel_size: expected an effective kernel of at most")
    assert page.get_attribute("#branches", "aria-invalid") == "true"
    with explorer.next_run():
        page.fill("#branches", "")
    assert page.is_hidden("#branches-card")


@pytest.mark.parametrize(
    ("layer", "operand", "window", "how"),
    [
        ("MaxUnpool2d", "indices", ["0 0 1"], "row 0, column 1: 3"),
        (
            "GlobalPool2d",
            "weights",
            [f"0 {y} {x}" for y in range(4) for x in range(4)],
            "rows 0 to 3, columns 0 to 3: 8",
        ),
        ("SegmentPool", "offsets", ["0 0 0", "0 0 1", "0 0 2", "0 0 3"], "columns 0 to 3: 12"),
        ("RoIAlign", "boxes", ["0 0 0", "0 0 1", "0 1 0", "0 1 1"], "box 0, rows 0 to 1, columns 0 to 1: 2.438"),
    ],
)
def test_a_second_tensor(explorer: Explorer, layer: str, operand: str, window: list[str], how: str) -> None:
    """A layer that takes one has a field for it, with an example; the part of the input that counts is marked."""
    page = explorer.page
    with explorer.next_run():
        page.select_option("#layer-0-name", layer)
    field = f"#layer-0-{operand}"
    if layer == "GlobalPool2d":  # which can do without
        assert page.input_value(field) == ""
        with explorer.next_run():
            page.fill(field, page.get_attribute(field, "placeholder") or "")
    json.loads(page.input_value(field))
    explorer.step_to({"MaxUnpool2d": 11}.get(layer, 0))
    assert page.inner_text("#how") == how
    assert explorer.window("in") == window
    page.fill(field, "[[7")
    explorer.wait_for_error(f"layer-0-{operand}", "expected a nested list of numbers")
    assert page.get_attribute(field, "aria-invalid") == "true"
    page.fill(field, "[[[[[0]]]]]")
    explorer.wait_for_error(f"layer-0-{operand}", "expected ")
    if layer != "GlobalPool2d":
        with explorer.next_run():
            page.fill(field, "")
            page.locator(field).blur()
        json.loads(page.input_value(field))


def test_the_same_call_with_branches_and_a_second_tensor(explorer: Explorer, tmp_path: Path) -> None:
    """The Python program and the call of curl have the branches and the operand that they share."""
    page = explorer.page
    with explorer.next_run():
        page.select_option("#layer-0-name", "GlobalPool2d")
    with explorer.next_run():
        page.fill("#layer-0-weights", "[[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]")
    with explorer.next_run():
        page.fill("#branches", "GlobalPool2d('mean')")
    assert page.locator("#branch-boards td").all_inner_texts() == ["4", "1.75"]
    (tmp_path / "call.py").write_text(page.inner_text("#code"))
    assert _run(sys.executable, str(tmp_path / "call.py")).split() == [
        "[[[4.]]]",
        "(1,",
        "1,",
        "1)",
        "[[[1.75]]]",
        "(1,",
        "1,",
        "1)",
    ]
    page.click("#tab-json")
    body = page.inner_text("#code").partition("-d '")[2].rstrip("'").replace("""'"'"'""", "'")
    answer = send(page.url.partition("://")[2].rstrip("/"), "/v1/pool", body).json
    assert [answer["output"], answer["branches"][0]["output"]] == [[[4]], [[1.75]]]
    page.click("#tab-command")
    (tmp_path / "save.py").write_text(
        "import numpy as np\n"
        + "\n".join((tmp_path / "call.py").read_text().split("\n")[3:5])
        + "\nnp.savez('input.npz', x=x, weights=weights)\n"
    )
    lines = page.inner_text("#code").replace("poolrpc ", f"{sys.executable} -m poolrpc ")
    printed = _run("bash", "-c", f"cd {tmp_path} && {sys.executable} save.py && {lines.partition(chr(10))[2]}")
    assert "GlobalPool2d('mean')" in printed


def picture(width: int, height: int) -> bytes:
    """Return a PNG: red on its left half, blue on its right one."""
    row = b"\0" + b"\xff\0\0" * (width // 2) + b"\0\0\xff" * (width - width // 2)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row * height)), chunk(b"IEND", b""))
    )


def test_an_image_of_ones_own(explorer: Explorer) -> None:
    """An image is made smaller in the browser and pooled in its three channels; another file has a message."""
    explorer.page.select_option("#source", "image")
    with explorer.next_run():
        explorer.page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": picture(200, 100)})
    assert explorer.page.locator("#steps small").all_inner_texts() == ["(3, 48, 96) float32", "(3, 24, 48) float32"]
    left, right = explorer.page.evaluate(
        "(() => { const data = document.querySelector('#out canvas').getContext('2d').getImageData(0, 0, 48, 24).data;"
        " return [[...data.slice(0, 3)], [...data.slice(47 * 4, 47 * 4 + 3)]]; })()"
    )
    assert (left, right) == ([255, 0, 0], [0, 0, 255])
    explorer.page.set_input_files("#file", {"name": "x.txt", "mimeType": "text/plain", "buffer": b"no image"})
    explorer.wait_for_error("input", "expected an image that this browser can read, got another file")


def test_the_same_call_runs(explorer: Explorer, tmp_path: Path) -> None:
    """The Python program, the command and the call of curl that the page shows have the output that it shows."""
    with explorer.next_run():
        explorer.page.fill("#layer-0-stride", "1")
    texts = {}
    for name in ("python", "command", "json"):
        explorer.page.click(f"#tab-{name}")
        texts[name] = explorer.page.inner_text("#code")
    (tmp_path / "call.py").write_text(texts["python"])
    printed = _run(sys.executable, str(tmp_path / "call.py"))
    assert "[[[6. 8. 8.]" in printed.replace("\n", "")
    assert texts["command"].startswith("poolrpc explain 'MaxPool2d(2, stride=1)'")
    command = texts["command"].replace("poolrpc ", f"{sys.executable} -m poolrpc ", 1)
    assert "6 8 8" in _run("bash", "-c", command)
    body = texts["json"].partition("-d '")[2].rstrip("'")
    answer = send(explorer.page.url.partition("://")[2].rstrip("/"), "/v1/pool", body).json
    assert answer["output"] == [[6, 8, 8], [6, 8, 8], [9, 7, 3]]
    assert json.loads(body)["layer"] == answer["layer"] == "MaxPool2d(2, stride=1)"


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout  # noqa: S603 - the page's


def test_the_call_can_be_copied(opened: Opened) -> None:
    """The button puts the text on the clipboard."""
    with opened(permissions=["clipboard-read", "clipboard-write"]) as explorer:
        explorer.page.click("#tab-json")
        explorer.page.click("#copy")
        explorer.page.wait_for_function("() => document.querySelector('#copy').textContent === 'Copied'")
        copied = explorer.page.evaluate("navigator.clipboard.readText()")
        assert copied == explorer.page.inner_text("#code")
        assert copied.startswith("curl ")


def test_time_and_load(explorer: Explorer) -> None:
    """The time of each stage is shown, and the load of the server, which is asked for again and again."""
    stages = explorer.page.locator("#stages dt").all_inner_texts()
    assert stages == ["receive", "queue", "compute", "send", "outside"]
    times = explorer.page.locator("#stages dd").all_inner_texts()
    assert all(each.endswith(" ms") for each in times)
    assert sum(float(each.split()[0]) for each in times[:4]) > 0
    explorer.page.wait_for_selector("#load dt")
    load = dict(
        zip(
            explorer.page.locator("#load dt").all_inner_texts(),
            explorer.page.locator("#load dd").all_inner_texts(),
            strict=True,
        )
    )
    assert load["queue"] == "0 of 64"
    with explorer.page.expect_response("**/v1/load"):
        pass


def test_the_keyboard_is_enough(explorer: Explorer) -> None:
    """A person without a mouse changes the layer and its parameters, moves windows, and reads the call."""
    page = explorer.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.locator("#window").focus()
    page.keyboard.press("ArrowRight")
    assert explorer.window("out") == ["0 0 1"]
    assert page.get_attribute("#window", "aria-valuetext") == "window 2 of 4"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "source"
    with explorer.next_run():
        page.locator("#layer-0-kernel_size").focus()
        page.keyboard.press("ArrowUp")
    assert page.inner_text("#stage-title") == "MaxPool2d(3)"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "layer-0-stride"
    page.locator("#tab-python").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-command"
    assert "poolrpc" in page.inner_text("#code")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_serious_for_axe(opened: Opened, scheme: str, width: int) -> None:
    """A check by axe finds nothing: with numbers, with a picture, with an error, and on a phone."""
    with opened(color_scheme=scheme, viewport={"width": width, "height": 900}, bypass_csp=True) as explorer:
        page = explorer.page
        page.wait_for_selector("#load dt")
        page.evaluate(axe())
        found = _violations(explorer)
        with explorer.next_run():
            page.select_option("#source", "digit")
        with explorer.next_run():
            page.fill("#layer-0-padding", "1")
        with explorer.next_run():
            page.fill("#layer-0-stride", "5")
        found += _violations(explorer)
        with explorer.next_run():
            page.select_option("#source", "photo")
        found += _violations(explorer)
        page.fill("#layer-0-padding", "9")
        explorer.wait_for_error("layer-0-padding", "expected")
        found += _violations(explorer)
        with explorer.next_run():
            page.select_option("#layer-0-name", "RoIAlign")
        with explorer.next_run():
            page.fill("#branches", "AvgPool2d(2)\nMaxPool2d(32)")
        found += _violations(explorer)
    assert found == []


def _violations(explorer: Explorer) -> list[str]:
    # Dimmed on purpose while the parameters are wrong: it is the previous result.
    options = {"rules": {}, "resultTypes": ["violations"]}
    context = {"exclude": [["#stage[data-stale] .boards"], ["#stage[data-stale] .how"]]}
    found: list[dict[str, Any]] = explorer.page.evaluate(
        "async ([context, options]) => (await axe.run(context, options)).violations", [context, options]
    )
    return [
        f"{each['impact']}: {each['id']}: {each['nodes'][0]['html']}: {each['nodes'][0]['failureSummary']}"
        for each in found
    ]


def test_no_request_leaves_the_machine(explorer: Explorer) -> None:
    """Whatever a person does, every request goes to the server of the page."""
    for source in ("photo", "digit", "plane"):
        with explorer.next_run():
            explorer.page.select_option("#source", source)
    explorer.page.wait_for_selector("#load dt")
    assert explorer.hosts == {explorer.page.url.partition("://")[2].rstrip("/")}


def test_nothing_overflows_a_phone(opened: Opened) -> None:
    """On a phone the page is as wide as its window, with numbers, a picture and a volume."""
    with opened(viewport={"width": 360, "height": 740}) as explorer:
        for source in ("plane", "digit", "photo", "volume", "signal"):
            if source != "plane":
                with explorer.next_run():
                    explorer.page.select_option("#source", source)
            assert explorer.page.evaluate("document.documentElement.scrollWidth") <= 360, source
            with explorer.next_run():
                explorer.page.fill(
                    "#branches", f"AvgPool{1 if source == 'signal' else 3 if source == 'volume' else 2}d(1)"
                )
            assert explorer.page.evaluate("document.documentElement.scrollWidth") <= 360, source
            with explorer.next_run():
                explorer.page.fill("#branches", "")


def test_a_server_that_starts_again(opened: Opened) -> None:
    """While there is no server, the page says so; when there is one again, it connects and calls by itself."""
    first = Server(Config(listen=("127.0.0.1:0",), explorer="127.0.0.1:0"))
    first.start()
    address = first.explorer_address
    with opened(address) as explorer:
        first.stop(0)
        explorer.page.fill("#layer-0-stride", "1")
        explorer.page.wait_for_function("() => document.querySelector('#status').dataset.state === 'down'")
        assert explorer.page.inner_text("#banner").startswith("The server does not answer.")
        assert explorer.cells("out") == [["6", "8"], ["9", "3"]]
        second = Server(Config(listen=("127.0.0.1:0",), explorer=address))
        second.start()
        try:
            with explorer.next_run():
                pass
            assert explorer.cells("out")[0] == ["6", "8", "8"]
            assert explorer.page.inner_text("#status") == "connected"
            assert explorer.page.is_hidden("#banner")
        finally:
            second.stop(0)


def test_a_full_server(opened: Opened, gate: Gate) -> None:  # noqa: F811 - the fixture
    """While the queue is full, the page says so and tries again, until it has its answer."""
    server = Server(Config(listen=("127.0.0.1:0",), explorer="127.0.0.1:0", threads=1, max_queue=1))
    server.start()
    held = {"layer": "GlobalPool2d('max')", "input": [[1]]}
    try:
        with opened(server.explorer_address) as explorer, ThreadPoolExecutor(2) as threads:
            calls = [threads.submit(send, server.explorer_address, "/v1/pool", held)]
            assert gate.entered.wait(30)
            calls.append(threads.submit(send, server.explorer_address, "/v1/pool", held))
            while sum(send(server.explorer_address, "/v1/load").json["queue"]) < 1:
                pass
            explorer.page.fill("#layer-0-stride", "1")
            explorer.page.wait_for_function("() => document.querySelector('#status').dataset.state === 'busy'")
            assert explorer.page.inner_text("#banner").startswith("The server is busy: ")
            with explorer.next_run():
                gate.opened.set()
            assert explorer.cells("out")[0] == ["6", "8", "8"]
            assert explorer.page.is_hidden("#banner")
            assert explorer.page.inner_text("#status") == "connected"
            assert [each.result(30).status for each in calls] == [200, 200]
    finally:
        gate.opened.set()
        server.stop(0)


def test_a_server_with_tokens(opened: Opened, tmp_path: Path) -> None:
    """The page asks for the token, rejects a wrong one with a message, and works with the right one."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ann {hashlib.sha256(b'secret').hexdigest()}\n")
    server = Server(Config(listen=("127.0.0.1:0",), explorer="127.0.0.1:0", token_file=str(tokens)))
    server.start()
    try:
        with opened(server.explorer_address, at_once=False) as explorer:
            page = explorer.page
            page.goto(f"http://{server.explorer_address}")
            page.wait_for_selector("#token-form:not([hidden])")
            page.fill("#token", "wrong")
            page.keyboard.press("Enter")
            page.wait_for_function(
                "() => document.querySelector('#banner').textContent === 'The server does not know this token.'"
            )
            page.fill("#token", "secret")
            page.keyboard.press("Enter")
            explorer.wait_for_run(1)
            assert page.is_hidden("#token-form")
            assert page.is_hidden("#banner")
            page.click("#tab-json")
            assert "secret" not in page.inner_text("#code")
            assert "$POOLRPC_TOKEN" in page.inner_text("#code")
    finally:
        server.stop(0)


def test_colors_follow_the_system_or_the_button(opened: Opened) -> None:
    """The page is dark where the system is, and the button overrides it."""
    background = "getComputedStyle(document.body).backgroundColor"
    with opened(color_scheme="dark") as explorer:
        dark = explorer.page.evaluate(background)
        explorer.page.click("#theme")
        assert explorer.page.inner_text("#theme span:last-child") == "Light"
        assert explorer.page.evaluate(background) != dark
        explorer.page.click("#theme")
        assert explorer.page.evaluate(background) == dark


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("explorer", {"viewport": {"width": 1280, "height": 980}}),
        ("explorer-dark", {"viewport": {"width": 1280, "height": 980}, "color_scheme": "dark"}),
        ("explorer-branches", {"viewport": {"width": 1280, "height": 980}}),
        ("explorer-phone", {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}),
    ],
)
def test_the_pictures_of_the_docs(opened: Opened, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """The screenshots of the docs are taken here: of a desktop, dark, with boxes and branches, and of a phone.

    They replace those of the docs if POOLRPC_PICTURES is set, to docs/figures: no two are equal, since times differ.
    """
    with opened(**options) as explorer:
        page = explorer.page
        page.wait_for_selector("#load dt")
        if name == "explorer-dark":
            with explorer.next_run():
                page.select_option("#source", "photo")
            with explorer.next_run():
                page.click("#add")
            explorer.step_to(300)
        elif name == "explorer-branches":
            with explorer.next_run():
                page.select_option("#source", "photo")
            with explorer.next_run():
                page.select_option("#layer-0-name", "RoIAlign")
            with explorer.next_run():
                page.fill("#layer-0-output_size", "6")
            with explorer.next_run():
                page.fill("#branches", "[RoIPool(6), MaxPool2d(2)]\nGlobalPool2d('mean')")
            page.select_option("#plane", "3")
            page.wait_for_function("() => document.querySelector('#how').textContent.startsWith('box 1, ')")
            explorer.step_to(9)
        else:
            explorer.step_to(1)
        page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        path = Path(os.environ.get("POOLRPC_PICTURES", tmp_path)) / f"{name}.png"
        page.screenshot(path=path)
    assert _size(path) == _size(ROOT / "docs/figures" / path.name)


def _size(picture: Path) -> tuple[int, int]:
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    return width, height
