"""How every benchmark measures: cases, the machine, the check before the timing, the report."""
