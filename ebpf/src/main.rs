//! reeve's programs in the kernel: who may open a connection, accept one, send a packet.
//!
//! In: the maps that the daemon fills. Out: a verdict at each hook, and events. The modules stand
//! in the order in which a connection meets them; `judge` holds the rule that they share.
#![no_std]
#![no_main]

mod address;
mod bind;
mod connect;
mod event;
mod expected;
mod failing;
mod flow;
mod icmp;
mod judge;
mod lookup;
mod maps;
mod namespace;
mod packet;
mod parse;
mod segment;
mod sender;
mod sendmsg;
mod sock_ops;
mod sockopt;
mod translate;

/// Licence that the kernel asks for before it allows the helpers used here.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: nothing here panics; were it to, the verifier would refuse the program at load.
    unsafe { core::hint::unreachable_unchecked() }
}
