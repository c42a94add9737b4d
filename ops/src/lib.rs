//! LinFusion attention operators.
