//! Finding attention. Every exporter's and optimizer's variant is brought to one
//! canonical form ([`core::Core`]) by a data-flow walk from its anchor; what the
//! form means ([`site::Site`]) and what it is turned into are later steps.

pub mod core;
pub mod exact;
pub mod kind;
pub mod layer;
pub mod layout;
pub mod names;
pub mod origin;
pub mod plain;
pub mod projection;
pub mod site;
pub mod stream;
