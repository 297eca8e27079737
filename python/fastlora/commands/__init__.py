"""The commands of `fastlora`, a file each; :mod:`fastlora.cli` puts them together."""
