"""`cowfs completion`: print a shell's completion script for commands, options, snapshot names."""

import click

PROGRAMS = ("cowfs", "cowdu", "cowdump")
SHELLS = ("bash", "zsh", "fish")


def script(shell: str, program: str) -> str:
    """Make the completion script of a program for one of the SHELLS."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click knows all three
    # The script runs the program to complete a word, so an empty command is enough to make it.
    text = kind(click.Command(program), {}, program, f"_{program.upper()}_COMPLETE").source()
    # click's script for fish splits `type,value` at every comma, but mount options contain commas.
    return text.replace('(string split "," $completion)', '(string split -m 1 "," $completion)')


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.argument("program", type=click.Choice(PROGRAMS), default="cowfs")
def completion(shell: str, program: str) -> None:
    """Print a shell's completion script for cowfs or another PROGRAM.

    \b
    cowfs completion bash > ~/.local/share/bash-completion/completions/cowfs
    cowfs completion fish > ~/.config/fish/completions/cowfs.fish
    cowfs completion zsh cowdu > ~/.zfunc/_cowdu

    `cowfs integrate` installs all of them where the shells look.
    """
    click.echo(script(shell, program))
