package cri

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that decoder wraps
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// decoder is the codec of the server. It answers a request that is no such message (text that is not UTF-8, bytes that are
// no fields) with InvalidArgument and the name of the field, where gRPC says Internal, as if that were berth's fault, and
// nothing else, before any interceptor is called. For that it lets such a message through, and the handlers that strict
// wraps ask what became of it.
type decoder struct {
	encoding.CodecV2
	log *slog.Logger
	bad sync.Map // of messages that could not be read, to their errors; each is taken out by the handler that has it
}

func newDecoder(log *slog.Logger) *decoder {
	return &decoder{CodecV2: encoding.GetCodecV2("proto"), log: log}
}

// Unmarshal implements encoding.CodecV2.
func (d *decoder) Unmarshal(data mem.BufferSlice, v any) error {
	err := d.CodecV2.Unmarshal(data, v)
	m, ok := v.(proto.Message)
	if err == nil || !ok {
		return err
	}
	text := "the request is no message of this call: " + err.Error()
	if field, value := badText(m.ProtoReflect().Descriptor(), data.Materialize()); field != "" {
		text = fmt.Sprintf("%s: %.*q: is not text in UTF-8", field, maxValue, value)
	}
	d.bad.Store(v, status.Error(codes.InvalidArgument, text))
	return nil
}

// verdict is the error of a message that could not be read.
func (d *decoder) verdict(call string, m any) error {
	err, ok := d.bad.LoadAndDelete(m)
	if !ok {
		return nil
	}
	d.log.Info("a request cannot be read", "call", call, "error", status.Convert(err.(error)).Message())
	return err.(error)
}

// strict wraps the handlers of a service.
func (d *decoder) strict(service grpc.ServiceDesc) *grpc.ServiceDesc {
	methods := make([]grpc.MethodDesc, len(service.Methods))
	for i, m := range service.Methods {
		handle := m.Handler
		m.Handler = func(srv any, ctx context.Context, decode func(any) error, around grpc.UnaryServerInterceptor) (any, error) {
			return handle(srv, ctx, func(req any) error {
				if err := decode(req); err != nil {
					return err
				}
				return d.verdict(m.MethodName, req)
			}, around)
		}
		methods[i] = m
	}
	streams := make([]grpc.StreamDesc, len(service.Streams))
	for i, s := range service.Streams {
		handle := s.Handler
		s.Handler = func(srv any, stream grpc.ServerStream) error {
			return handle(srv, strictStream{stream, d, s.StreamName})
		}
		streams[i] = s
	}
	service.Methods, service.Streams = methods, streams
	return &service
}

type strictStream struct {
	grpc.ServerStream
	decoder *decoder
	call    string
}

// RecvMsg implements grpc.ServerStream.
func (s strictStream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if bad := s.decoder.verdict(s.call, m); bad != nil { // to be taken out also where more is wrong
		return bad
	}
	return err
}

// badText finds the first text of an encoded message that is not UTF-8, and where it stands. It descends no further than
// the types of messages do, none of which contains itself.
func badText(t protoreflect.MessageDescriptor, data []byte) (field string, value []byte) {
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return "", nil
		}
		data = data[n:]
		n = protowire.ConsumeFieldValue(number, kind, data)
		if n < 0 {
			return "", nil
		}
		f := t.Fields().ByNumber(number)
		if f != nil && kind == protowire.BytesType {
			content, _ := protowire.ConsumeBytes(data)
			switch {
			case f.Kind() == protoreflect.StringKind && !utf8.Valid(content):
				return f.TextName(), content
			case f.Message() != nil:
				if below, value := badText(f.Message(), content); below != "" {
					return f.TextName() + "." + below, value
				}
			}
		}
		data = data[n:]
	}
	return "", nil
}
