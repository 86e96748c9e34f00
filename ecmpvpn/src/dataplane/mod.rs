//! Loads, attaches and pins the BPF programs; typed views of their maps. The only module that touches BPF.
