"""Sessions on other machines over SSH: a copy of the journal's tail, and a forwarded socket."""
