"""Companion tools on top of the package cowfs; installed as the package cowfs_tools."""
