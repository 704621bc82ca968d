"""`cowfs completion`: the script that teaches a shell the commands, options and snapshot names."""

import click

PROGRAMS = ("cowfs", "cowdu", "cowdump")
SHELLS = ("bash", "zsh", "fish")


def script(shell: str, program: str) -> str:
    """The completion script of a program for one of the SHELLS."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click knows all three
    # The script asks the program itself; the command is not needed to write it.
    text = kind(click.Command(program), {}, program, f"_{program.upper()}_COMPLETE").source()
    # click's script for fish cuts `type,value` at every comma, and mount options have some.
    return text.replace('(string split "," $completion)', '(string split -m 1 "," $completion)')


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.argument("program", type=click.Choice(PROGRAMS), default="cowfs")
def completion(shell: str, program: str) -> None:
    """Print the completion script for a shell, of cowfs or another PROGRAM.

    \b
    cowfs completion bash > ~/.local/share/bash-completion/completions/cowfs
    cowfs completion fish > ~/.config/fish/completions/cowfs.fish
    cowfs completion zsh cowdu > ~/.zfunc/_cowdu

    `cowfs integrate` puts all of them where the shells look.
    """
    click.echo(script(shell, program))
