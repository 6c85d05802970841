//! The host's client of the agent, with the agent that images carry as an ordinary process of this host, and with some that are none.

mod agents;
mod real;
mod strange;
