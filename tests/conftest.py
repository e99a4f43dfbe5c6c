"""Fixtures for the whole suite."""

from tests.swift import s3_server

__all__ = ["s3_server"]
