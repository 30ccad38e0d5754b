// Package cni answers CNI plugins of the reference project (github.com/containernetworking/plugins) in this process, over
// netlink.
//
// [Plugins.Run] promises for the plugins that are [Known] what their programs, of version 1.9, do: the same results, errors
// of the specification, state of the kernel and files on disk. What is different on purpose is listed, with reasons, in
// differential_test.go, which runs both beside each other.
//
// Nothing is executed, but for what the configuration asks for:
//   - macspoofchk is left to the reference project's package, which runs nft;
//   - on a node whose iptables does not keep rules in nf_tables as this package does ("legacy"), its own program masquerades;
//   - where portmap would need that, or conditions, another chain for marks, SCTP, it is [ErrProgram];
//   - so it is where firewall would need that, or names of chains and interfaces that iptables may not take as they are.
//
// Where firewalld runs, firewall asks it over D-Bus, as the reference does.
//
// A node without iptables has its rules in tables of nftables, whether it has the nft program or not.
//
// host-local gives back addresses whose files are empty, which the reference plugin keeps for ever. Where a program of the
// reference crashes (bandwidth without a result of an earlier plugin, args for sysctls of tuning without sysctls), there is an
// error, or what was meant.
//
// The caller's thread is in the network namespace of the node. What is done in a pod's is done on threads that end with it.
package cni
