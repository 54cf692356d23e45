"""Each screen on a frozen session, at the smallest size that is complete and at a generous one."""

import pytest

SIZES = ((80, 24), (120, 40))
SCREENS = {
    "sessions": ["1"], "dashboard": ["g", "n", "n"], "samples": ["3", "v"], "checkpoints": ["4"],
    "log": ["5"], "help": ["question_mark"], "stop": ["S"], "metrics": ["m"],
    "labels": ["3", "j", "j", "j"], "beside": ["3", "d"], "abreast": ["3", "d", "z"],
}  # fmt: skip
CASES = [(screen, size) for screen in SCREENS for size in SIZES]
CASES += [(screen, (160, 50)) for screen in ("labels", "beside", "abreast")]


UNCHANGED = 10
"""How often a screen is looked at without a change before it counts as complete."""


async def read(app, pilot, until):
    """Waits until the session is read; the newest samples come last."""
    await until(pilot, lambda: app.state.samples, "the session")


async def drawn(app, pilot, until):
    """Waits until no thread reads for the screen and its picture does not change."""
    pictures = []

    def unchanged():
        if any(worker.is_running for worker in app.workers):
            pictures.clear()
            return False
        pictures.append(app.export_screenshot())
        return pictures[-UNCHANGED:] == pictures[-1:] * UNCHANGED

    await until(pilot, unchanged, "a screen that does not change")


@pytest.mark.parametrize(
    ("screen", "size"), CASES, ids=[f"{screen}-{w}x{h}" for screen, (w, h) in CASES]
)
def test_a_screen_looks_as_it_did(
    snap_compare, make_app, root, monkeypatch, request, screen, size, until
):
    monkeypatch.setenv("HOME", str(root.parent))
    app = make_app()
    if screen == "stop":
        request.getfixturevalue("engine")

    async def settle(pilot):
        await read(app, pilot, until)
        await pilot.press(*SCREENS[screen])
        await drawn(app, pilot, until)

    assert snap_compare(app, terminal_size=size, run_before=settle)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keys", ["z", "zv", "zd"], ids=["text", "tokens", "beside"])
def test_a_response_of_several_turns_looks_as_it_did(
    snap_compare, make_app, talk, keys, size, until
):
    app = make_app("talk", root=talk.folder.parent)

    async def settle(pilot):
        await read(app, pilot, until)
        await pilot.press("3", *keys)
        await drawn(app, pilot, until)

    assert snap_compare(app, terminal_size=size, run_before=settle)


@pytest.mark.parametrize("theme", ["light", "contrast"])
def test_a_theme_looks_as_it_did(snap_compare, make_app, theme, until):
    app = make_app()
    app.theme = theme

    async def settle(pilot):
        await read(app, pilot, until)
        await drawn(app, pilot, until)

    assert snap_compare(app, terminal_size=(80, 24), run_before=settle)
