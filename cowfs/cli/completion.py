"""`cowfs completion`: the script that teaches a shell the commands, options and snapshot names."""

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    \b
    cowfs completion bash > ~/.local/share/bash-completion/completions/cowfs
    cowfs completion fish > ~/.config/fish/completions/cowfs.fish
    """
    from click.shell_completion import get_completion_class

    from cowfs.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None  # click knows all three
    click.echo(kind(cli, {}, "cowfs", "_COWFS_COMPLETE").source())
