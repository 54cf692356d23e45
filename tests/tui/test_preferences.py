"""What is remembered between two sittings."""

from concurrent.futures import ThreadPoolExecutor

from rlhf_tui.state import preferences as prefs


def test_what_was_chosen_comes_back():
    chosen = prefs.Preferences(theme="light", charts=["a", "b + c"], columns=3, log=["a"])
    assert prefs.save(prefs.preferences_file(), chosen) == ""
    assert prefs.load_preferences() == (chosen, "")


def test_a_broken_file_is_left_aside_with_a_notice():
    path = prefs.preferences_file()
    path.parent.mkdir(parents=True)
    path.write_text('{"theme": 7}')
    found, problem = prefs.load_preferences()
    assert found == prefs.Preferences()
    assert str(path) in problem


def test_without_a_file_there_is_nothing_to_complain_about():
    assert prefs.load_preferences() == (prefs.Preferences(), "")


def test_an_unknown_theme_becomes_the_first():
    prefs.save(prefs.preferences_file(), prefs.Preferences(theme="neon"))
    assert prefs.load_preferences()[0].theme == prefs.THEME_NAMES[0]


def test_a_folder_that_cannot_be_written_only_costs_the_remembering(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    problem = prefs.save(prefs.preferences_file(), prefs.Preferences())
    assert "cannot save" in problem


def test_what_was_seen_of_one_session_leaves_the_others(tmp_path):
    prefs.remember_seen("/a", prefs.Seen(time=1.0, step=10, event=3))
    prefs.remember_seen("/b", prefs.Seen(time=2.0, step=20, event=4))
    assert prefs.load_seen()["/a"].step == 10
    assert prefs.load_seen()["/b"].event == 4


def test_threads_that_save_at_once_do_not_disturb_each_other():
    def save(_number):
        return prefs.save(prefs.preferences_file(), prefs.Preferences())

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(save, range(100))) == {""}
