"""The type checker that the tests run the library under."""

import beartype

# An int is fine where a float is expected, as for every other type checker (PEP 484).
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
