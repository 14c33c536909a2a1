//! Stack and length of the kernel programs, as the oldest supported verifier counts them.
//!
//! Linux 6.1 rounds each function's frame up to 32 bytes and refuses a program whose calls add up
//! to more than 512 (`check_max_stack_depth` in its `kernel/bpf/verifier.c`). Newer kernels round
//! to 16, so a program can load on the machine that builds it and on no older one.

use object::{
    Endianness, Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionIndex, SymbolKind,
    read::elf::ElfFile64,
};

/// Bytes that a chain of calls may take: the kernel's 512, less what the next change may need.
pub(crate) const STACK_BUDGET: usize = 480;

/// Frames are rounded up to this.
const FRAME: usize = 32;
/// Deeper chains of calls are refused by every kernel; a recursion has no end.
const MAX_CALLS: usize = 8;

/// Bytes of an instruction.
const INSTRUCTION: usize = 8;
/// Classes of instructions: the lowest three bits of the first byte.
const CLASS: u8 = 0x07;
const LD: u8 = 0x00;
const LDX: u8 = 0x01;
const ST: u8 = 0x02;
const STX: u8 = 0x03;
const ALU: u8 = 0x04;
const ALU64: u8 = 0x07;
/// Whole first bytes.
const MOVE_REGISTER: u8 = 0xbf;
const ADD_CONSTANT: u8 = 0x07;
const CALL: u8 = 0x85;
/// Source "register" of a call to another function of the object.
const PSEUDO_CALL: u8 = 1;
/// The register that points to the end of the frame.
const FRAME_POINTER: usize = 10;

/// A function of the object.
#[derive(Debug)]
pub(crate) struct Function {
    /// Its symbol's name.
    pub(crate) name: String,
    /// Instructions, as they lie in the object.
    pub(crate) instructions: usize,
    /// Bytes of its own frame.
    pub(crate) frame: usize,
    /// Functions that it calls, as indices.
    pub(crate) calls: Vec<usize>,
}

/// The deepest chain of calls from one function.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Bytes of all frames, each rounded up.
    pub(crate) stack: usize,
    /// The functions, outermost first.
    pub(crate) functions: Vec<usize>,
}

/// Fails when a chain of calls in the object takes more than the budget; else says for each
/// function what it takes.
pub(crate) fn check(object: &[u8]) -> Result<String, String> {
    let functions = functions(object)?;
    let mut table = String::from("stack  instructions  calls\n");
    for index in 0..functions.len() {
        let chain = deepest(&functions, index)?;
        let names: Vec<_> = chain
            .functions
            .iter()
            .map(|index| {
                let function = &functions[*index];
                format!("{} ({})", function.name, function.frame)
            })
            .collect();
        let names = names.join(" -> ");
        if chain.stack > STACK_BUDGET {
            return Err(format!(
                "the kernel programs take {} bytes of stack, more than the budget of \
                 {STACK_BUDGET}: {names}. Linux 6.1 allows 512 and rounds each frame up to \
                 {FRAME}. Pass keys and values by reference, or move work into a function beside \
                 the chain",
                chain.stack,
            ));
        }
        let instructions = functions[index].instructions;
        table += &format!("{:5}  {instructions:12}  {names}\n", chain.stack);
    }
    Ok(table)
}

/// The deepest chain of calls from a function.
pub(crate) fn deepest(functions: &[Function], from: usize) -> Result<Chain, String> {
    deepest_below(functions, from, MAX_CALLS)
}

fn deepest_below(functions: &[Function], from: usize, calls: usize) -> Result<Chain, String> {
    let function = &functions[from];
    if calls == 0 {
        return Err(format!("{} is called too deeply", function.name));
    }
    let mut below = Chain {
        stack: 0,
        functions: Vec::new(),
    };
    for called in &function.calls {
        let chain = deepest_below(functions, *called, calls - 1)?;
        if chain.stack > below.stack {
            below = chain;
        }
    }
    below.stack += function.frame.max(1).next_multiple_of(FRAME);
    below.functions.insert(0, from);
    Ok(below)
}

/// The functions of an object.
pub(crate) fn functions(object: &[u8]) -> Result<Vec<Function>, String> {
    let failed = |error| format!("could not read the kernel programs: {error}");
    let file = ElfFile64::<Endianness>::parse(object).map_err(failed)?;
    let symbols: Vec<_> = file
        .symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0)
        .filter_map(|symbol| Some((symbol.section_index()?, symbol.address(), symbol)))
        .collect();
    let find = |section: SectionIndex, address: u64| {
        symbols
            .iter()
            .position(|(of, start, _)| (*of, *start) == (section, address))
            .ok_or_else(|| format!("no function at {address:#x} of section {section}"))
    };
    let mut functions = Vec::with_capacity(symbols.len());
    for (section, start, symbol) in &symbols {
        let code = file.section_by_index(*section).map_err(failed)?;
        let bytes = code
            .data_range(*start, symbol.size())
            .map_err(failed)?
            .ok_or_else(|| format!("a function at {start:#x} has no code"))?;
        let code_of = Code {
            bytes,
            big: !file.is_little_endian(),
        };
        let mut calls = Vec::new();
        for (at, imm) in code_of.calls() {
            let at = start + at;
            let relocation = code.relocations().find(|(offset, _)| *offset == at);
            // A call counts from the next instruction; a relocated one from its symbol's.
            let (section, from) = match relocation.map(|(_, relocation)| relocation.target()) {
                Some(RelocationTarget::Symbol(index)) => {
                    let symbol = file.symbol_by_index(index).map_err(failed)?;
                    let of = symbol.section_index().ok_or("a call leaves the object")?;
                    (of, symbol.address() as i64)
                }
                _ => (*section, at as i64),
            };
            calls.push(find(section, (from + (i64::from(imm) + 1) * 8) as u64)?);
        }
        functions.push(Function {
            name: symbol.name().map_err(failed)?.to_owned(),
            instructions: bytes.len() / INSTRUCTION,
            frame: code_of.frame(),
            calls,
        });
    }
    Ok(functions)
}

/// The instructions of one function.
pub(crate) struct Code<'a> {
    /// As they lie in the object.
    pub(crate) bytes: &'a [u8],
    /// Whether the object is big-endian.
    pub(crate) big: bool,
}

/// One instruction, or the second half of a long one, which has the opcode 0.
struct Instruction {
    at: u64,
    opcode: u8,
    destination: usize,
    source: u8,
    offset: i64,
    imm: i32,
}

impl Code<'_> {
    fn instructions(&self) -> impl Iterator<Item = Instruction> {
        let whole = self.bytes.chunks_exact(INSTRUCTION);
        whole.enumerate().map(|(index, bytes)| {
            let (low, high) = (bytes[1] & 0xf, bytes[1] >> 4);
            let offset = [bytes[2], bytes[3]];
            let imm = [bytes[4], bytes[5], bytes[6], bytes[7]];
            let (destination, source, offset, imm) = if self.big {
                (
                    high,
                    low,
                    i16::from_be_bytes(offset),
                    i32::from_be_bytes(imm),
                )
            } else {
                (
                    low,
                    high,
                    i16::from_le_bytes(offset),
                    i32::from_le_bytes(imm),
                )
            };
            Instruction {
                at: (index * INSTRUCTION) as u64,
                opcode: bytes[0],
                destination: usize::from(destination),
                source,
                offset: i64::from(offset),
                imm,
            }
        })
    }

    /// Calls of other functions: where each is, and what it says of its target.
    fn calls(&self) -> impl Iterator<Item = (u64, i32)> {
        self.instructions()
            .filter(|it| it.opcode == CALL && it.source == PSEUDO_CALL)
            .map(|it| (it.at, it.imm))
    }

    /// Bytes of the frame: the deepest that is read or written, or pointed to.
    pub(crate) fn frame(&self) -> usize {
        // Which registers point into the frame, and where.
        let mut known = [None::<i64>; 16];
        known[FRAME_POINTER] = Some(0);
        let mut deepest = 0;
        for it in self.instructions() {
            let source = known[usize::from(it.source)];
            let destination = known[it.destination];
            let reached = match it.opcode & CLASS {
                LDX => source.map(|base| base + it.offset),
                ST | STX => destination.map(|base| base + it.offset),
                _ => None,
            };
            let result = match it.opcode {
                MOVE_REGISTER => source,
                ADD_CONSTANT => destination.map(|base| base + i64::from(it.imm)),
                _ => None,
            };
            deepest = deepest.min(reached.unwrap_or(0)).min(result.unwrap_or(0));
            if it.opcode == CALL {
                known[..6].fill(None);
            } else if matches!(it.opcode & CLASS, LD | LDX | ALU | ALU64) && it.opcode != 0 {
                known[it.destination] = result;
            }
        }
        deepest.unsigned_abs() as usize
    }
}
