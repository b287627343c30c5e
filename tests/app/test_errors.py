"""Errors of tasks that run side by side come to the caller as one."""

from app.errors import DataError, ServiceError, one_of


def test_errors_of_ours_are_told_by_the_first_and_a_fault_of_the_program_by_all():
    first, fault = ServiceError("gone"), KeyError("x")
    assert one_of(ExceptionGroup("", [ExceptionGroup("", [first]), DataError("odd")])) is first
    several = ExceptionGroup("", [first, fault])
    assert one_of(several) is several
