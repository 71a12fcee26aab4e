"""Prove a part: every promise that its kind makes, as tests.

    from pegboard.testing import contract_for
    from my_plugin import MyDataset

    test_contract = contract_for(MyDataset, config={"path": "data/sample.db"})

That one line is a pytest function with a case for each check of the kind. The built-in parts pass
the same checks; `checks_for(kind)` lists them.
"""

from pegboard.testing.case import Case, Check, checks_for, contract_for

__all__ = ["Case", "Check", "checks_for", "contract_for"]
