package model

import (
	"errors"
	"unique"
)

// portKey names a port of a Service, or of its slices, in a family: that is how they belong together.
type portKey struct {
	family   Family
	protocol Protocol
	name     unique.Handle[string]
}

// Up to so many ports, looking through a list is faster than making a map.
const fewPorts = 16

// A Service has so many endpoints for all its ports together. 250,000 endpoints in 5,000 Services is what a large cluster has.
const maxEndpoints = 1 << 20

var errTooManyEndpoints = errors.New("endpoints for all ports together are more than 1048576; the Service is left out")

// source is a slice's endpoints at one of its ports.
type source struct {
	key   portKey
	slice *slice
	port  uint16
}

// sources are those of a Service, by slices' names and then as the slices have them.
type sources struct {
	list []source
	many map[portKey][]source
	// weights and even are those of the Service.
	weights []weightRule
	even    bool
}

// indexSlices lists the ports of a Service's slices, which are sorted by name, into a buffer that is used again.
func indexSlices(buf []source, from []*slice) sources {
	x := sources{list: buf[:0]}
	for _, s := range from {
		for _, p := range s.ports {
			x.list = append(x.list, source{portKey{s.family, p.protocol, p.name}, s, p.port})
		}
	}
	if len(x.list) > fewPorts {
		x.many = make(map[portKey][]source, len(x.list))
		for _, s := range x.list {
			x.many[s.key] = append(x.many[s.key], s)
		}
	}
	return x
}

// each calls for all sources of a port.
func (x *sources) each(key portKey, do func(*source)) {
	list := x.list
	if x.many != nil {
		list = x.many[key]
	}
	for i := range list {
		if list[i].key == key {
			do(&list[i])
		}
	}
}

// oldPorts finds the ports that a Service had.
type oldPorts struct {
	service *Service
	many    map[portKey]*Port
}

func indexPorts(s *Service) oldPorts {
	x := oldPorts{service: s}
	if s != nil && len(s.Ports) > fewPorts {
		x.many = make(map[portKey]*Port, len(s.Ports))
		for i := range s.Ports {
			p := &s.Ports[i]
			x.many[portKey{p.Family, p.Protocol, unique.Make(p.Name)}] = p
		}
	}
	return x
}

// find is the port by that name; nil if there was none.
func (x *oldPorts) find(key portKey) *Port {
	if x.many != nil || x.service == nil {
		return x.many[key]
	}
	for i := range x.service.Ports {
		if p := &x.service.Ports[i]; p.Family == key.family && p.Protocol == key.protocol && p.Name == key.name.Value() {
			return p
		}
	}
	return nil
}
