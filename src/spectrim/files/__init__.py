"""Atomic writes, bounded reads of JSON, and redirection of foreign output to standard error."""

from spectrim.files.output import printing_to_stderr
from spectrim.files.text import DIGEST, JSON_LIMIT, check_digest, digest_of, read_json, write_json, write_text
from spectrim.files.whole import check_room, make_folder, new_files, put, sweep, sync, target_of, temporary_beside, whole_file

__all__ = [
    "DIGEST",
    "JSON_LIMIT",
    "check_digest",
    "check_room",
    "digest_of",
    "make_folder",
    "new_files",
    "printing_to_stderr",
    "put",
    "read_json",
    "sweep",
    "sync",
    "target_of",
    "temporary_beside",
    "whole_file",
    "write_json",
    "write_text",
]
