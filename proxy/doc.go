// Package proxy is a drop-in for kube-proxy: Run takes what package watch hands on, has package model compute what changes, and
// a Programmer (package nft) have the kernel do it.
//
// It promises that nothing is programmed before all was listed; that the first change is programmed at once, and those that come
// while the kernel works go together; that what fails is tried again, and that what other programs change in the kernel's
// tables is mended. Run ends with its context, and leaves the rules: connections and Services go on. Cleanup removes them.
package proxy
