"""Every option that names an output is checked when the command line is read, except for stores of
targets, which may be finished and on a read-only disk."""

import click
import pytest
from click.testing import CliRunner

from dftserve.cli import main
from dftserve.commandline import writable

OUTPUTS = {"out", "html", "plots"}
CHECK_THEMSELVES = {("target", "build", "out"), ("target", "students", "out")}


def commands(group: click.Group, *names: str):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


WITH_OUTPUT = [
    pytest.param(names, option, id=" ".join((*names, option.opts[0])))
    for names, command in commands(main)
    for option in command.params
    if isinstance(option, click.Option)
    and option.name in OUTPUTS
    and (*names, option.name) not in CHECK_THEMSELVES
]


@pytest.mark.parametrize(("names", "option"), WITH_OUTPUT)
def test_an_output_below_a_file_is_refused_by_the_name_of_its_option(tmp_path, names, option):
    """Before other options are looked at: no command has its arguments here."""
    assert option.callback is writable
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "folder" / "output"
    with pytest.raises(click.BadParameter, match="cannot be made: Not a directory"):
        option.process_value(click.Context(click.Command("c")), str(place))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_an_output_where_nobody_may_write_is_refused_for_root_too():
    result = CliRunner().invoke(main, ["checkpoint", "scale", "adapter", "--out", "/proc/out"])
    assert result.exit_code == 2
    assert "Invalid value for '--out': /proc/out cannot be written: " in result.output


def test_there_are_outputs():
    assert len(WITH_OUTPUT) > 8
