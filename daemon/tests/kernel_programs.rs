//! The build's check of the kernel programs' stack.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test that fails shall say where"
)]

#[path = "../build/stack.rs"]
mod stack;

use stack::{Code, Function, STACK_BUDGET, check, deepest, functions};

/// The object that the daemon loads.
const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/reeve-ebpf"));

fn function(frame: usize, calls: &[usize]) -> Function {
    Function {
        name: format!("function of {frame}"),
        instructions: 1,
        frame,
        calls: calls.to_vec(),
    }
}

/// One little-endian instruction.
fn instruction(opcode: u8, destination: u8, source: u8, offset: i16, imm: i32) -> Vec<u8> {
    let mut bytes = vec![opcode, source << 4 | destination];
    bytes.extend(offset.to_le_bytes());
    bytes.extend(imm.to_le_bytes());
    bytes
}

fn frame(instructions: &[Vec<u8>]) -> usize {
    let bytes = &instructions.concat();
    Code { bytes, big: false }.frame()
}

#[test]
fn adds_up_the_deepest_chain_with_each_frame_rounded_up_to_32() {
    // What Linux 6.1 refused once: 544 of 512.
    let functions = [
        function(208, &[1, 3]),
        function(144, &[2, 3]),
        function(112, &[3]),
        function(0, &[]),
    ];
    let chain = deepest(&functions, 0).expect("no recursion");
    assert_eq!(chain.stack, 224 + 160 + 128 + 32);
    assert_eq!(chain.functions, [0, 1, 2, 3]);
}

#[test]
fn refuses_a_recursion() {
    let functions = [function(8, &[1]), function(8, &[0])];
    assert!(deepest(&functions, 0).is_err());
}

#[test]
fn a_frame_is_as_deep_as_its_deepest_access_or_pointer() {
    let store = instruction(0x7b, 10, 1, -40, 0);
    let load = instruction(0x79, 1, 10, -24, 0);
    assert_eq!(frame(&[store.clone(), load]), 40);
    // r2 = r10; r2 += -100; *(u64 *)(r2 - 4) = r1
    let copy = instruction(0xbf, 2, 10, 0, 0);
    let add = instruction(0x07, 2, 0, 0, -100);
    let through = instruction(0x7b, 2, 1, -4, 0);
    assert_eq!(frame(&[store.clone(), copy.clone(), add.clone()]), 100);
    assert_eq!(frame(&[copy.clone(), add.clone(), through.clone()]), 104);
    // r2 = r1 in between: it points elsewhere.
    let other = instruction(0xbf, 2, 1, 0, 0);
    assert_eq!(frame(&[copy, other, add, through]), 0);
}

#[test]
fn counts_every_program_of_the_object_and_the_functions_that_it_calls() {
    let functions = functions(OBJECT).expect("the object can be read");
    let egress = functions
        .iter()
        .position(|function| function.name == "reeve_egress")
        .expect("the object has the program");
    let chain = deepest(&functions, egress).expect("no recursion");
    let names: Vec<_> = chain
        .functions
        .iter()
        .map(|index| functions[*index].name.as_str())
        .collect();
    // By way of the section's own symbol, and by a symbol of the function's.
    assert!(names.len() > 2, "{names:?}");
    assert!(chain.stack > 0 && chain.stack <= STACK_BUDGET, "{chain:?}");
    for function in &functions {
        assert!(function.instructions > 0, "{function:?}");
    }
}

#[test]
fn names_the_chain_that_takes_too_much() {
    // The object, with every frame made deeper by one access of the program's.
    let mut object = OBJECT.to_vec();
    let wide = instruction(0x7a, 10, 0, -480, 0);
    let entry = entry_of(&object, "reeve_egress");
    object[entry..entry + 8].copy_from_slice(&wide);
    let message = check(&object).expect_err("480 bytes and what it calls are too much");
    assert!(message.contains("reeve_egress (480) -> "), "{message}");
    assert!(message.contains("Linux 6.1 allows 512"), "{message}");
}

/// Where a function's code lies in the object.
fn entry_of(object: &[u8], name: &str) -> usize {
    use object::{Endianness, Object, ObjectSection, ObjectSymbol, read::elf::ElfFile64};
    let file = ElfFile64::<Endianness>::parse(object).expect("an object");
    let symbol = file
        .symbols()
        .find(|symbol| symbol.name() == Ok(name))
        .expect("the symbol");
    let section = symbol.section_index().expect("a section");
    let section = file.section_by_index(section).expect("a section");
    let (start, _) = section.file_range().expect("code");
    (start + symbol.address()) as usize
}
